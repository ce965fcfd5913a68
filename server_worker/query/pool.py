"""Processes that evaluate queries side by side. SEAL holds Python's lock, so threads would wait for each other.

thread ──▶ its process ──▶ thread         a line for each: when a process dies, its line breaks, and nothing waits
"""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from nightsplit.server_worker.protocols.he_clstm import HeClstmServer
from nightsplit.shared.errors import Refused, StateError
from nightsplit.shared.he.ckks import PublicKeys
from nightsplit.shared.he.weights import ClassifierWeights
from nightsplit.shared.runtime.process import prepare_torch

Evaluate = Callable[[PublicKeys, int, str, Sequence[bytes], str, str], "Future[list[bytes]]"]
"""`HeClstmServer.answer`, begun."""


@contextmanager
def evaluation_pool(classifier: ClassifierWeights, secret: bytes, processes: int) -> Iterator[Evaluate]:
    """Evaluate in so many processes while the block runs; what it has begun by its end is finished, and dropped.

    What is begun raises, besides what `HeClstmServer.answer` does, StateError: 509 its process is gone.

    Args:
        classifier, secret: as for `HeClstmServer`.
        processes: at most so many, each started when it is needed.
    """
    own, started = threading.local(), list[_Process]()

    def begin() -> None:
        own.process = _Process(classifier, secret)
        started.append(own.process)

    def answer(*given: Any) -> list[bytes]:
        process: _Process = own.process
        return process.answer(*given)

    threads = ThreadPoolExecutor(processes, initializer=begin)
    try:
        yield lambda *given: threads.submit(answer, *given)
    finally:
        threads.shutdown(cancel_futures=True)
        for process in started:
            process.end()


class _Process:
    """A `HeClstmServer` elsewhere."""

    def __init__(self, classifier: ClassifierWeights, secret: bytes) -> None:
        context = get_context("forkserver")
        self._line, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, classifier, secret))
        self._process.start()
        theirs.close()

    def answer(self, *given: Any) -> list[bytes]:
        """As `HeClstmServer.answer`."""
        try:
            self._line.send(given)
            found: list[bytes] | Refused = self._line.recv()
        except (EOFError, OSError):
            what = "one that evaluates queries has ended."
            raise StateError(509, what, "start the same command again: no query is lost.") from None
        if isinstance(found, Refused):
            raise found
        return found

    def end(self) -> None:
        self._line.close()
        self._process.join()


def _work(line: Connection, classifier: ClassifierWeights, secret: bytes) -> None:
    """Until the line ends, as it does when the server dies."""
    prepare_torch(1, "cpu")
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal sends them to every process: the server decides
        signal.signal(number, signal.SIG_IGN)
    half = HeClstmServer(classifier, secret)
    with suppress(EOFError, OSError):
        while True:
            given = line.recv()
            try:
                found: list[bytes] | Refused = half.answer(*given)
            except Refused as refusal:
                found = refusal
            line.send(found)
