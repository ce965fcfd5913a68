"""Pool of processes that evaluate queries in parallel. SEAL holds Python's lock, so threads would block each other.

thread ──▶ its process ──▶ thread         a pipe for each: when a process dies, its pipe breaks, and no thread waits
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
"""`HeClstmServer.answer`, started in another process."""


@contextmanager
def evaluation_pool(classifier: ClassifierWeights, secret: bytes, processes: int) -> Iterator[Evaluate]:
    """Start a pool for the block; evaluations that still run at its end are completed and dropped.

    An evaluation raises the errors of `HeClstmServer.answer`, and StateError 509 when its process is gone. There are
    at most `processes`, each started when it is needed.
    """
    local, started = threading.local(), list[_Process]()

    def start() -> None:
        local.process = _Process(classifier, secret)
        started.append(local.process)

    def answer(*arguments: Any) -> list[bytes]:
        process: _Process = local.process
        return process.answer(*arguments)

    threads = ThreadPoolExecutor(processes, initializer=start)
    try:
        yield lambda *arguments: threads.submit(answer, *arguments)
    finally:
        threads.shutdown(cancel_futures=True)
        for process in started:
            process.end()


class _Process:
    """Process with a `HeClstmServer`."""

    def __init__(self, classifier: ClassifierWeights, secret: bytes) -> None:
        context = get_context("forkserver")
        self._pipe, other_end = context.Pipe()
        self._process = context.Process(target=_work, args=(other_end, classifier, secret))
        self._process.start()
        other_end.close()

    def answer(self, *arguments: Any) -> list[bytes]:
        """Call `HeClstmServer.answer`."""
        with suppress(EOFError, OSError):
            self._pipe.send(arguments)
            result: list[bytes] | Refused = self._pipe.recv()
            if isinstance(result, Refused):
                raise result
            return result
        # Not within an `except`: the pipe's error holds a buffer that Python cannot free together with it.
        remedy = "start the same command again: no query is lost."
        raise StateError(509, "a process that evaluates queries has ended.", remedy)

    def end(self) -> None:
        self._pipe.close()
        self._process.join()


def _work(pipe: Connection, classifier: ClassifierWeights, secret: bytes) -> None:
    """Evaluate queries until the pipe breaks, as it does when the server dies."""
    prepare_torch(1, "cpu")
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal sends them to every process: the server decides
        signal.signal(number, signal.SIG_IGN)
    server = HeClstmServer(classifier, secret)
    with suppress(EOFError, OSError):
        while True:
            arguments = pipe.recv()
            try:
                result: list[bytes] | Refused = server.answer(*arguments)
            except Refused as refusal:
                result = refusal
            pipe.send(result)
