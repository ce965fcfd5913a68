"""RabbitMQ, over pika."""
