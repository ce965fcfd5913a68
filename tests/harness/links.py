"""A bad line for tests: a TCP proxy with delay and bandwidth, whose faults come when they are called.

    worker ──up──▶ Line(service's port) ──up──▶ service
           ◀─down─                      ◀─down─

The delay and the bandwidth of a direction are shared by all connections, as on a hospital's uplink.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Literal, Self

Direction = Literal["up", "down"]

CHUNK = 16 * 2**10
"""Bytes that are passed on together: 32 ms of a line of 4 Mbit/s."""
SOCKET_BYTES = 64 * 2**10
"""What the system keeps for us: a slow line must make its sender wait, as a real one does."""


class _Way:
    """One direction: what has passed, when the line is free again, and after how many bytes it breaks."""

    def __init__(self) -> None:
        self.passed = 0
        self.free_at = 0.0
        self.last_due = 0.0
        self.breaks_after: int | None = None


class Line:
    """A proxy on a port of its own to `port` of this machine.

    Args:
        port: where the service listens.
        delay: seconds that each byte takes, each way.
        bits_per_s: bandwidth of each direction; None for no limit.

    Attributes:
        port: where the worker connects.
        resets: connections that `reset_after` has ended.
    """

    def __init__(self, port: int, delay: float = 0.0, bits_per_s: float | None = None) -> None:
        self._target, self._delay, self._bits_per_s = port, delay, bits_per_s
        self._ways: dict[Direction, _Way] = {"up": _Way(), "down": _Way()}
        self._silent = False
        self._pairs: set[_Pair] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.resets = 0
        self._listener: asyncio.Server | None = None
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="line", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._listen)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.refuse()
        self._call(self._finish)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def passed(self, direction: Direction) -> int:
        """Bytes that have reached the other end."""
        return self._ways[direction].passed

    @property
    def is_about_to_break(self) -> bool:
        """Whether a `reset_after` has yet to happen."""
        return any(way.breaks_after is not None for way in self._ways.values())

    # -- faults ----------------------------------------------------------------------------------

    def fall_silent(self) -> None:
        """From now on every byte vanishes, on old connections and new ones, and nobody is told."""
        self._call(self._fall_silent)

    def refuse(self) -> None:
        """End all connections with a reset, and let nobody connect."""
        self._call(self._refuse)

    def heal(self) -> None:
        """Let new connections through. Those that fell silent stay so: the routers have forgotten them."""
        self._call(self._heal)

    def reset_after(self, count: int, direction: Direction) -> None:
        """Reset the connection on which the next `count` bytes of a direction end, whichever that is."""
        self._ways[direction].breaks_after = count

    # -- on the loop's thread --------------------------------------------------------------------

    def _call(self, work: Callable[[], object]) -> None:
        async def run() -> None:
            result = work()
            if asyncio.iscoroutine(result):
                await result

        asyncio.run_coroutine_threadsafe(run(), self._loop).result(10)

    async def _listen(self) -> None:
        listener = socket.create_server(("127.0.0.1", self.port))  # the same port again after `refuse`
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BYTES)
        self._listener = await asyncio.start_server(self._connected, sock=listener, limit=CHUNK)
        self.port = listener.getsockname()[1]

    async def _finish(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _fall_silent(self) -> None:
        self._silent = True
        for pair in self._pairs:
            pair.silent = True

    def _refuse(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for pair in list(self._pairs):
            pair.reset()

    async def _heal(self) -> None:
        self._silent = False
        if self._listener is None:
            await self._listen()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        pair = _Pair(self._silent)
        self._pairs.add(pair)
        pair.writers.append(writer)
        try:
            with contextlib.suppress(OSError):
                beyond = socket.socket()
                beyond.setblocking(False)
                beyond.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BYTES)
                await self._loop.sock_connect(beyond, ("127.0.0.1", self._target))
                there, onward = await asyncio.open_connection(sock=beyond, limit=CHUNK)
                pair.writers.append(onward)
                await asyncio.gather(self._carry(pair, "up", reader, onward), self._carry(pair, "down", there, writer))
        finally:
            self._pairs.discard(pair)
            self._tasks.discard(task)
            pair.reset()

    async def _carry(
        self, pair: _Pair, direction: Direction, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Pass one direction on until its end, which travels as the bytes do."""
        way = self._ways[direction]
        while True:
            data = await reader.read(CHUNK)
            if pair.silent:
                if not data:
                    return
                continue
            now = self._loop.time()
            way.free_at = max(now, way.free_at)
            if self._bits_per_s is not None:
                way.free_at += 8 * len(data) / self._bits_per_s
            # Later than the one before it: callbacks of the same moment have no order.
            way.last_due = max(way.free_at + self._delay, way.last_due + 1e-6)
            self._loop.call_at(way.last_due, self._arrive, pair, way, writer, data)
            if not data:
                return
            await asyncio.sleep(way.free_at - now)
            await writer.drain()

    def _arrive(self, pair: _Pair, way: _Way, writer: asyncio.StreamWriter, data: bytes) -> None:
        if pair.silent or writer.is_closing():
            return
        if not data:
            writer.close()
            return
        breaks = way.breaks_after is not None and way.breaks_after <= len(data)
        if breaks:
            data = data[: way.breaks_after]
        if way.breaks_after is not None:
            way.breaks_after = None if breaks else way.breaks_after - len(data)
        way.passed += len(data)
        writer.write(data)
        if breaks:
            self.resets += 1
            pair.reset()


class _Pair:
    """A connection: the worker's half and, once it is there, the service's."""

    def __init__(self, silent: bool) -> None:
        self.silent = silent
        self.writers: list[asyncio.StreamWriter] = []

    def reset(self) -> None:
        """End both halves at once; their owners see "connection reset by peer"."""
        for writer in self.writers:
            line = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):
                line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
