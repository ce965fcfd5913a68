"""Programs that the benchmarks run: processes of their own, and a private broker."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from nightsplit.broker.rabbitmq.broker import RabbitBroker
from nightsplit.shared.transport import Broker, Queue
from tests.harness.services import RabbitNode

MiB = 2**20
TICKS = os.sysconf("SC_CLK_TCK")
_SPAWN = multiprocessing.get_context("spawn")


# ── processes ───────────────────────────────────────────────────────────────────────────────────


class Worker:
    """A process of its own that runs `work(line, *arguments)`; both ends talk through `line`."""

    def __init__(self, work: Callable[..., None], *arguments: Any) -> None:
        self._line, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_run, args=(theirs, work, arguments), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """Id of the process."""
        assert self._process.pid is not None
        return self._process.pid

    def say(self, what: Any) -> None:
        """Send something."""
        self._line.send(what)

    def hear(self, timeout: float = 600.0) -> Any:
        """Return the next message of the process, or raise its exception."""
        if not self._line.poll(timeout):
            raise TimeoutError(f"{self._process.name} said nothing for {timeout} s")
        what = self._line.recv()
        if isinstance(what, _Failed):
            raise RuntimeError(what.trace)
        return what

    def ask(self, what: Any, timeout: float = 600.0) -> Any:
        """`say`, then `hear`."""
        self.say(what)
        return self.hear(timeout)

    def end(self) -> None:
        """Wait for the end of the process, or bring it about."""
        self._process.join(10.0)
        self._process.kill()
        self._process.join()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:
            self._process.kill()
        self.end()


@dataclass
class _Failed:
    trace: str


def _run(line: Connection, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    try:
        work(line, *arguments)
    except BaseException:
        line.send(_Failed(traceback.format_exc()))


def cpu_seconds(pid: int, thread: int | None = None) -> float:
    """CPU time that a process, or one of its threads, has used (user and system)."""
    place = f"/proc/{pid}/task/{thread}/stat" if thread else f"/proc/{pid}/stat"
    fields = Path(place).read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def resident_bytes(pid: int | str = "self") -> int:
    """Memory of a process that is in RAM."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ── brokers ─────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Place:
    """A RabbitMQ server to measure with; `pid` is None where it is not ours."""

    url: str
    pid: int | None

    def broker(self, max_message_bytes: int = 16 * MiB) -> RabbitBroker:
        """Connects anew, as each process must for itself."""
        return RabbitBroker(self.url, max_message_bytes)


@contextmanager
def rabbitmq(url: str | None) -> Iterator[Place]:
    """The server at `url`, or a private node that ends with the block. Its queues are lazy."""
    if url is not None:
        yield Place(url, None)
        return
    with scratch() as folder, RabbitNode(folder / "rabbitmq") as node:
        vhost = node.vhost()
        (pid,) = _beams(folder)
        yield Place(vhost, pid)


def _beams(folder: Path) -> list[int]:
    """Erlang machines whose files are in `folder`."""
    found = []
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                command = (place / "cmdline").read_bytes()
            except OSError:
                continue
            if b"beam" in command.split(b"\0")[0] and str(folder).encode() in command:
                found.append(int(place.name))
    return found


@contextmanager
def scratch() -> Iterator[Path]:
    """An empty folder that is removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="nightsplit-bench-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def queues_of(broker: Broker, queues: list[Queue]) -> Iterator[None]:
    """Queues that are there within the block only."""
    broker.declare(queues)
    try:
        yield
    finally:
        broker.delete(queues)


def fresh_name(what: str) -> str:
    """A name that was not used before."""
    return f"{what}-{uuid.uuid4().hex[:8]}"
