"""Split learning as public repositories do it over RabbitMQ: auto-ack, transient queues, nothing kept on disk.

    python -m benchmarks.speed.autoack_loop server URL FOLDER
    python -m benchmarks.speed.autoack_loop north URL FOLDER

The pattern of filrg/split_learning and its siblings: queues that are not durable, transient messages
without confirms, `auto_ack=True` before the batch is computed, three batches in flight, the graph of a
forward kept in memory until its gradient comes. In two things this loop is kinder than they are: queues
are named after the site and not after a random number of the process, so that a restarted worker is heard
again; and a restarted site knows from its own notes which batch it had reached. No pickle either.

Every worker notes what it did in FOLDER/<worker>.txt, a line per message: "ready", "sent 7", "north 7", "learned 7".
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pika
import torch
from torch import nn

from tests.harness.workers import SHARES

IN_FLIGHT = 3
BATCH = 16
COLUMNS = (0, 1, 2, 4, 6, 8)
"""age, sex, bmi, tc, hdl, ltg of the panel; its sixth column is to be predicted."""
LABEL = 5
STOP = "stop"
"""A file of this name in the folder: sites send nothing more."""


def bottom() -> nn.Sequential:
    return nn.Sequential(nn.Linear(len(COLUMNS), 32), nn.ReLU())


def top() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 1))


def notebook(path: Path) -> Callable[[str], None]:
    """Writes lines that a kill does not take back."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(line: str) -> None:
        os.write(file, f"{line}\n".encode())

    return note


def serve(channel: pika.adapters.blocking_connection.BlockingChannel, folder: Path) -> None:
    module = top()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.003)
    note = notebook(folder / "server.txt")
    for site in SHARES:
        channel.queue_declare(f"{site}.down")
        channel.queue_declare(f"{site}.up")

    def learn(channel, method, properties, body) -> None:  # type: ignore[no-untyped-def]
        site, _, number = properties.message_id.partition(" ")
        content = torch.from_numpy(np.frombuffer(body, np.float32).reshape(BATCH, -1).copy())
        smashed = content[:, :-1].clone().requires_grad_()
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.mse_loss(module(smashed).squeeze(1), content[:, -1]))
        optimizer.step()
        assert smashed.grad is not None
        channel.basic_publish(
            "", f"{site}.down", smashed.grad.numpy().tobytes(), pika.BasicProperties(message_id=number)
        )
        note(f"{site} {number}")

    for site in SHARES:
        channel.basic_consume(f"{site}.up", learn, auto_ack=True)
    note("ready")
    channel.start_consuming()


def send(channel: pika.adapters.blocking_connection.BlockingChannel, folder: Path, site: str) -> None:
    panel = np.loadtxt(folder / "lipids.csv", delimiter=",", skiprows=1, dtype=np.float32)
    first, last = (round(share * len(panel)) for share in SHARES[site])
    panel = (panel[first:last] - panel.mean(0)) / panel.std(0)
    inputs, labels = torch.from_numpy(panel[:, COLUMNS]), torch.from_numpy(panel[:, LABEL])
    module = bottom()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.003)
    notes = folder / f"{site}.txt"
    before = notes.read_text().split("\n") if notes.exists() else []
    number = max((int(line.split()[1]) for line in before if line.startswith("sent")), default=0)
    note = notebook(notes)
    forwards: dict[int, torch.Tensor] = {}
    for queue in (f"{site}.up", f"{site}.down"):
        channel.queue_declare(queue)
    note("ready")
    for method, properties, body in channel.consume(f"{site}.down", auto_ack=True, inactivity_timeout=0.01):
        if method is not None and int(properties.message_id) in forwards:
            gradient = torch.from_numpy(np.frombuffer(body, np.float32).reshape(BATCH, -1).copy())
            optimizer.zero_grad()
            torch.autograd.backward(forwards.pop(int(properties.message_id)), gradient)
            optimizer.step()
            note(f"learned {properties.message_id}")
        while len(forwards) < IN_FLIGHT and not (folder / STOP).exists():
            number += 1
            rows = torch.randperm(len(inputs))[:BATCH]
            forwards[number] = module(inputs[rows])
            content = torch.cat([forwards[number].detach(), labels[rows, None]], 1).numpy().tobytes()
            channel.basic_publish("", f"{site}.up", content, pika.BasicProperties(message_id=f"{site} {number}"))
            note(f"sent {number}")


def main() -> None:
    worker, url, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    torch.set_num_threads(1)
    torch.manual_seed(1)
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        channel = connection.channel()
        if worker == "server":
            serve(channel, folder)
        else:
            send(channel, folder, worker)


if __name__ == "__main__":
    main()
