"""RabbitMQ broker, over pika."""
