"""Speed of messages of a size through a broker, beside a bare TCP connection on the same machine.

    python -m benchmarks.speed.transport [--quick] [--rounds N] [--json FILE] [--broker URL]

One process publishes, keeping `WINDOW` messages unconfirmed, while another receives and acknowledges
each; messages are persistent and every one is confirmed. The clock runs at the receiver, from the
first message after the warm-up to the last. TCP is `sendall` to `recv_into` between two processes
over the loopback device, timed in the same round.
"""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.speed.common import MiB, Place, Worker, cpu_seconds, fresh_name, queues_of, rabbitmq, scratch
from benchmarks.speed.figures import Figure, Results, arguments
from nightsplit.broker.embedded.broker import EmbeddedBroker
from nightsplit.broker.topology import site_queues
from nightsplit.shared.runtime.process import prepare_torch
from nightsplit.shared.transport import Broker, Confirmed, Delivery, Link, Queue

SIZES = {"64kb": 64 * 2**10, "1mb": MiB, "4mb": 4 * MiB}
WINDOW = 16
PREFETCH = 32
WARMUP = 0.1  # of the messages


@dataclass(frozen=True)
class Embedded:
    """The embedded broker in a folder, as `common.Place` is a RabbitMQ server."""

    folder: Path

    def broker(self) -> Broker:
        """Opens it anew."""
        return EmbeddedBroker(self.folder)


def _figures() -> list[Figure]:
    figures = []
    for size in reversed(SIZES):
        bounds = (0.30, 0.20) if size == "4mb" else (None, None)
        figures += [
            Figure(f"publish_consume_{size}_over_tcp", f"RabbitMQ, {size}: over loopback TCP", *bounds),
            Figure(f"rabbitmq_{size}_mb_per_s", "  MB per second"),
            Figure(f"rabbitmq_{size}_publisher_cpu_s_per_gb", "  CPU s per GB: publisher"),
            Figure(f"rabbitmq_{size}_consumer_cpu_s_per_gb", "  CPU s per GB: consumer"),
            Figure(f"rabbitmq_{size}_broker_cpu_s_per_gb", "  CPU s per GB: broker"),
            Figure(f"embedded_{size}_over_tcp", f"embedded broker, {size}: over loopback TCP"),
            Figure(f"embedded_{size}_mb_per_s", "  MB per second"),
            Figure(f"tcp_{size}_mb_per_s", f"loopback TCP, {size}: MB per second"),
        ]
    return figures


# ── through a broker ────────────────────────────────────────────────────────────────────────────


def publisher(line: Connection, place: Place | Embedded, queue: Queue, size: int, count: int) -> None:
    """Publishes `count` messages; says its CPU seconds."""
    prepare_torch(1, "cpu")  # as every worker does
    body = bytes(size)
    with place.broker().link([], PREFETCH, "publisher") as link:
        line.send("ready")
        line.recv()
        began = time.process_time()
        for number in range(count):
            while len(link.unconfirmed) >= WINDOW:
                _expect(link, Confirmed)
            link.publish(queue, f"message/{number}", [body])
        while link.unconfirmed:
            _expect(link, Confirmed)
        line.send(time.process_time() - began)


def consumer(line: Connection, place: Place | Embedded, queue: Queue, size: int, count: int) -> None:
    """Receives `count` messages; says MB per second, and its CPU seconds."""
    prepare_torch(1, "cpu")
    with place.broker().link([queue], PREFETCH, "consumer") as link:
        line.send("ready")
        began_cpu = time.process_time()
        warmup, began = int(count * WARMUP), 0.0
        for number in range(count):
            delivery = _expect(link, Delivery)
            assert isinstance(delivery, Delivery)
            assert len(delivery.body) == size
            link.acknowledge(delivery)
            if number + 1 == warmup:
                began = time.perf_counter()
        rate = (count - warmup) * size / 1e6 / (time.perf_counter() - began)
        line.send((rate, time.process_time() - began_cpu))


def _expect(link: Link, kind: type) -> object:
    event = link.receive(60.0)
    if not isinstance(event, kind):
        raise RuntimeError(f"expected {kind.__name__}, got {event}")
    return event


def through(place: Place | Embedded, size: int, count: int) -> dict[str, float]:
    """One stretch through a broker: MB per second, and CPU seconds per GB where they can be told."""
    queue = site_queues(fresh_name("bench"), "north", 8 * 2**30).up
    pid = place.pid if isinstance(place, Place) else None
    with queues_of(place.broker(), [queue]), Worker(consumer, place, queue, size, count) as taker:
        taker.hear()
        with Worker(publisher, place, queue, size, count) as giver:
            giver.hear()
            before = cpu_seconds(pid) if pid else 0.0
            giver.say("go")
            rate, consumed = taker.hear()
            published = giver.hear()
            broker = cpu_seconds(pid) - before if pid else 0.0
    total = size * count / 1e9
    return {
        "mb_per_s": rate, "publisher_cpu_s_per_gb": published / total, "consumer_cpu_s_per_gb": consumed / total,
        "broker_cpu_s_per_gb": broker / total,
    }  # fmt: skip


# ── over TCP ────────────────────────────────────────────────────────────────────────────────────


def tcp_sender(line: Connection, port: int, size: int, count: int) -> None:
    """Sends `count` times `size` bytes."""
    body = bytes(size)
    with socket.create_connection(("127.0.0.1", port)) as stream:
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(count):
            stream.sendall(body)
        line.recv()


def tcp_receiver(line: Connection, size: int, count: int) -> None:
    """Receives them; says MB per second."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        line.send(listener.getsockname()[1])
        stream, _ = listener.accept()
    view = memoryview(bytearray(size))

    def take(messages: int) -> None:
        for _ in range(messages):
            missing = size
            while missing:
                missing -= stream.recv_into(view[:missing])

    with stream:
        take(warmup := int(count * WARMUP))
        began = time.perf_counter()
        take(count - warmup)
        line.send((count - warmup) * size / 1e6 / (time.perf_counter() - began))


def tcp(size: int, count: int) -> float:
    """MB per second over the loopback device."""
    with Worker(tcp_receiver, size, count) as receiver, Worker(tcp_sender, receiver.hear(), size, count) as sender:
        rate: float = receiver.hear()
        sender.say("done")
    return rate


def measure(name: str, volume: int, place: Place, folder: Path) -> dict[str, float]:
    """One size, by key; the ratio that it is for comes first."""
    size = SIZES[name]
    loopback = tcp(size, 4 * volume // size)
    values = {}
    for broker, ratio, where in (
        ("rabbitmq", "publish_consume", place),
        ("embedded", "embedded", Embedded(folder / "embedded")),
    ):
        seen = through(where, size, min(volume // size, 4000))
        values[f"{ratio}_{name}_over_tcp"] = seen["mb_per_s"] / loopback
        values.update({f"{broker}_{name}_{key}": value for key, value in seen.items()})
    return {**values, f"tcp_{name}_mb_per_s": loopback}


def main() -> None:
    options = arguments(__doc__ or "", rounds=7).parse_args()
    volume = 200 * 10**6 if options.quick else 800 * 10**6
    with rabbitmq(options.broker) as place, scratch() as folder:
        results = Results(_figures(), options.patience, options.retries, place.pid)
        for number in range(2 if options.quick else options.rounds):
            results.console.print(f"round {number + 1}:")
            for name in SIZES:
                results.round(name, partial(measure, name, volume, place, folder))
    results.finish("Messages through a broker: persistent, confirmed, one publisher and one consumer", options.json)


if __name__ == "__main__":
    main()
