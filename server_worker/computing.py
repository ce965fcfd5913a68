"""Processes that evaluate queries side by side. SEAL holds Python's lock, so threads would wait for each other."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context, parent_process

from server_worker.protocols.he_clstm import HeClstmServer
from shared.ckks import PublicKeys
from shared.models.judge import Judge
from shared.worker import prepare_torch

Evaluate = Callable[[PublicKeys, int, str, Sequence[bytes], str, str], "Future[list[bytes]]"]
"""`HeClstmServer.answer`, begun."""


@contextmanager
def evaluating(judge: Judge, secret: bytes, processes: int) -> Iterator[Evaluate]:
    """Evaluate in so many processes while the block runs; what it has begun by its end is finished, and dropped.

    Args:
        judge, secret: as for `HeClstmServer`.
        processes: at most so many, each started when it is needed.
    """
    pool = ProcessPoolExecutor(processes, get_context("forkserver"), _begin, (judge, secret))

    def evaluate(
        keys: PublicKeys, step: int, packing: str, pieces: Sequence[bytes], before: str, after: str
    ) -> Future[list[bytes]]:
        return pool.submit(_answer, keys, step, packing, pieces, before, after)

    try:
        yield evaluate
    finally:
        pool.shutdown(cancel_futures=True)


_half: HeClstmServer
"""Of this process."""


def _begin(judge: Judge, secret: bytes) -> None:
    global _half
    prepare_torch(1, "cpu")
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal sends them to every process: the server decides
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_server, daemon=True).start()
    _half = HeClstmServer(judge, secret)


def _end_with_the_server() -> None:
    """However that one ends; otherwise a killed server would leave processes behind that wait for ever."""
    server = parent_process()
    assert server is not None
    server.join()
    os._exit(1)


def _answer(keys: PublicKeys, step: int, packing: str, pieces: Sequence[bytes], before: str, after: str) -> list[bytes]:
    return _half.answer(keys, step, packing, pieces, before, after)
