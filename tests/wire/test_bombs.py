"""Small messages made to cost much: each is refused by its number, for less than a good message, without memory.

`python -m tests.wire.test_bombs` prints how many bytes the process grew while it read each bomb for
the first time: zstd and torch allocate where tracemalloc does not look. Each bomb is read by a fresh
fork, so that none finds room that another has left.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import pickle
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
import zstandard

from benchmarks.speed.common import MiB
from nightsplit.shared.errors import Refused
from nightsplit.shared.wire import format as wire
from nightsplit.shared.wire import head
from nightsplit.shared.wire.message import Kind, Message
from nightsplit.shared.wire.schema import Payload, TensorSpec
from tests.faults.fuzz import Growth, read
from tests.faults.specimens import LIMIT, MARK, Specimen, rebuilt, specimens

LONG = head.MAX_HEADER - 1000
"""Bytes that surely fit into a header beside everything else."""


@cache
def good(name: str = "split_frozen/mlp/fp32+zstd/smashed") -> Specimen:
    """Tensors "smashed" (3, 4), compressed, and "targets" (3,), raw."""
    return next(specimen for specimen in specimens() if specimen.name == name)


def with_field(key: str, value: Any) -> bytes:
    return rebuilt(good().fields | {key: value}, good().parts)


def with_bytes(key: str, packed: bytes) -> bytes:
    return rebuilt(good().fields | {key: MARK}, good().parts, packed)


def with_column(column: int, value: Any) -> bytes:
    """The row of "smashed" says something else."""
    fields = good().fields
    fields["tensors"][0][column] = value
    return rebuilt(fields, good().parts)


def with_frame(frame: bytes, shape: list[int] | None = None) -> bytes:
    """Another zstd frame for "smashed", of an honest length; with another shape for both tensors if given."""
    fields = good().fields
    smashed, targets = fields["tensors"]
    smashed[6] = len(frame)
    if shape is not None:
        smashed[4], targets[4] = shape, shape[:1]
    return rebuilt(fields, [frame, good().parts[1]])


@cache
def zeros(size: int) -> bytes:
    """A frame that inflates to so many zeros and says so."""
    return zstandard.ZstdCompressor(level=1).compress(bytes(size))


def lying_frame(size: int, stated: int) -> bytes:
    """A frame that inflates to `size` zeros and states another size."""
    frame = zeros(size)
    assert frame[4] >> 6 == 2, "the size stands in four bytes"
    at = 5 if frame[4] & 0x20 else 6
    assert struct.unpack_from("<I", frame, at) == (size,)
    return frame[:at] + struct.pack("<I", stated) + frame[at + 4 :]


def unsized(size: int) -> bytes:
    stream = zstandard.ZstdCompressor(level=1).compressobj()
    return stream.compress(bytes(size)) + stream.flush()


def rows(count: int, shape: list[int]) -> list[list[Any]]:
    return [[f"{number:04}", "raw", False, "bool", shape, 0, 1] for number in range(count)]


CLAIMS_4096 = b"\xdd\x00\x00\x10\x00"
NOTHING = b"\x28\xb5\x2f\xfd\x20\x00\x01\x00\x00"  # an empty zstd frame
WIDE_WINDOW = b"\x28\xb5\x2f\xfd\x80\xff" + struct.pack("<I", 48) + b"\x01\x00\x00"  # announces 3.75 TiB

BOMBS: dict[str, tuple[Callable[[], bytes], int]] = {
    "zstd: 256 MiB, and says so": (lambda: with_frame(zeros(256 * MiB)), 311),
    "zstd: 256 MiB, says the 48 bytes of the shape": (lambda: with_frame(lying_frame(256 * MiB, 48)), 311),
    "zstd: 16 MiB, and the shape agrees": (lambda: with_frame(zeros(16 * MiB), [MiB, 4]), 308),
    "zstd: says 4 GiB": (lambda: with_frame(lying_frame(256 * MiB, 2**32 - 1)), 311),
    "zstd: says no size": (lambda: with_frame(unsized(64 * MiB)), 311),
    "zstd: a window of terabytes": (lambda: with_frame(WIDE_WINDOW), 311),
    "zstd: a hundred thousand frames": (lambda: with_frame(NOTHING * 100_000), 311),
    "zstd: 48 bytes, then a skippable frame": (
        lambda: with_frame(good().parts[0] + b"\x50\x2a\x4d\x18" + struct.pack("<I", 500_000) + bytes(500_000)),
        311,
    ),
    "lists in lists that claim 4096 items each": (lambda: with_bytes("scalars", CLAIMS_4096 * (LONG // 5)), 301),
    "the same instead of a header": (lambda: rebuilt(MARK, [], CLAIMS_4096 * (LONG // 5)), 301),
    "the same instead of a row": (lambda: with_bytes("tensors", b"\x91" + CLAIMS_4096 * (LONG // 5)), 301),
    "lists in lists, a hundred thousand deep": (lambda: with_bytes("kind", b"\x91" * 100_000), 301),
    "maps in maps, fifty thousand deep": (lambda: with_bytes("scalars", b"\x81\xa1a" * 50_000), 301),
    "a quarter of a million empty maps": (
        lambda: with_bytes("tensors", b"\xdd" + LONG.to_bytes(4, "big") + b"\x80" * LONG),
        301,
    ),
    "a list that claims 2^32 - 1 items": (lambda: with_bytes("tensors", b"\xdd\xff\xff\xff\xff"), 301),
    "a map that claims 2^32 - 1 items": (lambda: rebuilt(MARK, [], b"\xdf\xff\xff\xff\xff" + b"\xa4wire\x01"), 301),
    "a string that claims 4 GiB": (lambda: with_bytes("run", b"\xdb\xff\xff\xff\xff"), 301),
    "bytes that claim 4 GiB": (lambda: with_bytes("run", b"\xc6\xff\xff\xff\xff"), 301),
    "an extension that claims 4 GiB": (lambda: with_bytes("seq", b"\xc9\xff\xff\xff\xff\x05"), 301),
    "an extension of a quarter of a megabyte": (lambda: with_field("seq", msgpack.ExtType(5, bytes(LONG))), 301),
    "a shape of 2^31 entries": (lambda: with_column(4, [2**29, 4]), 306),
    "a shape of 2^31 entries, both tensors": (lambda: with_frame(good().parts[0], [2**29, 4]), 308),
    "a shape whose product is 2^64": (lambda: with_frame(good().parts[0], [2**62, 4]), 308),
    "a shape of 2^64 - 1 in every dimension": (lambda: with_column(4, [2**64 - 1] * head.MAX_DIMENSIONS), 306),
    "a shape of two hundred thousand dimensions": (lambda: with_column(4, [1] * 200_000), 301),
    "negative lengths whose product is right": (lambda: with_column(4, [-3, -4]), 306),
    "a negative size": (lambda: with_column(6, -(2**63)), 301),
    "a size of 2^62": (lambda: with_column(6, 2**62), 309),
    "as many tiny tensors as a message may have": (
        lambda: with_field("tensors", rows(head.MAX_TENSORS, [1])),
        304,
    ),
    "more tiny tensors": (lambda: with_field("tensors", rows(8000, [1])), 301),
    "of as many dimensions": (
        lambda: with_field("tensors", rows(head.MAX_TENSORS, [300] * head.MAX_DIMENSIONS)),
        304,
    ),
    "eighty thousand scalars": (lambda: with_field("scalars", {f"{n:x}": 0 for n in range(40_000)}), 301),
    "a key fifty thousand times": (
        lambda: with_bytes("scalars", b"\xdf" + (50_000).to_bytes(4, "big") + b"\xa1a\x01" * 50_000),
        301,
    ),
    "every header field twice": (
        lambda: (lambda map_: len(map_).to_bytes(4, "big") + map_)(b"\xde\x00\x16" + good().packed[1:] * 2),
        301,
    ),
    "a run of a quarter of a million characters": (lambda: with_field("run", "x" * LONG), 301),
    "a kind that takes four times as long to print": (lambda: with_field("kind", "\x01" * LONG), 303),
    "a codec of a quarter of a million characters": (lambda: with_column(1, "\x01" * (LONG - 100)), 305),
    "a tensor with an endless name": (lambda: with_column(0, "\x01" * (LONG - 100)), 304),
    "a scalar with an endless name": (lambda: with_field("scalars", {"\x01" * LONG: 1}), 304),
    "a header that claims 4 GiB": (lambda: b"\xff\xff\xff\xff" + good().body[4:], 301),
    "a header that claims more than there is": (lambda: (2**17).to_bytes(4, "big") + good().body[4:], 309),
    "two megabytes behind a good message": (lambda: good().body + bytes(2 * MiB), 308),
    "half a megabyte behind a good message": (lambda: good().body + bytes(MiB // 2), 309),
    "a pickle of half a megabyte": (lambda: pickle.dumps([bytes(MiB // 2)]), 301),
}  # fmt: skip


def refusal(body: bytes) -> Refused:
    """Why a body is refused."""
    try:
        message = read(good().contract, body)
    except Refused as refused:
        return refused
    raise AssertionError(f"accepted as {message.header}")


def seconds(work: Callable[[], object]) -> float:
    """CPU time of `work`: the least of five, since the machine may be shared."""
    taken = []
    for _ in range(5):
        began = time.thread_time()
        work()
        taken.append(time.thread_time() - began)
    return min(taken)


@pytest.fixture(scope="module")
def dearest() -> float:
    """CPU seconds for a good message of as many tensors and dimensions as one may have."""
    names = [f"{number:04}" for number in range(head.MAX_TENSORS)]
    shape = (1,) * head.MAX_DIMENSIONS
    payload = Payload(Kind.NOTED, {name: TensorSpec(torch.bool, shape, "raw") for name in names})
    tensors = {name: torch.zeros(shape, dtype=torch.bool) for name in names}
    header = head.read_head(good().body).header
    body = b"".join(wire.encode(Message(header, tensors), payload, LIMIT))
    return seconds(lambda: read({header.kind: payload}, body))


@pytest.mark.parametrize("name", BOMBS)
def test_bomb(name: str, dearest: float) -> None:
    make, number = BOMBS[name]
    body = make()
    refused = refusal(body)
    assert refused.number == number, refused
    assert len(str(refused)) < 1000
    del refused
    assert seconds(lambda: refusal(body)) < dearest
    tracemalloc.start()
    refusal(body)
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert taken < MiB


def test_text_of_wide_characters_takes_a_few_times_its_header() -> None:
    """One wide character makes Python keep four bytes for each: what is left of all amplification."""
    body = with_field("kind", "x" * LONG + "😀")
    tracemalloc.start()
    assert refusal(body).number == 303
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert taken < 7 * head.MAX_HEADER


def test_no_bomb_takes_native_memory() -> None:
    child = subprocess.run(
        [sys.executable, "-m", "tests.wire.test_bombs"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    growth: dict[str, int] = json.loads(child.stdout)
    control = growth.pop("control")
    assert control > 4 * MiB, "the measure does not see memory that is taken"
    assert growth.keys() == BOMBS.keys()
    assert {name: taken for name, taken in growth.items() if taken >= MiB} == {}


def first_growth(work: Callable[[], object]) -> int:
    """Bytes by which a fork of this process grows while it does `work`, at the most."""
    out, into = os.pipe()
    if (pid := os.fork()) == 0:
        # Pages of code count as memory once they are touched, so each piece of code runs once before.
        read(good().contract, good().body)
        refusal(with_frame(good().parts[0][:-1]))
        ctypes.CDLL(None).malloc_trim(0)  # give back what is free, else it would be used again unseen
        growth = Growth()
        work()
        os.write(into, str(int(growth.mebibytes() * MiB)).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    grown = int(os.read(out, 100))
    os.close(out)
    os.close(into)
    return grown


def main() -> None:
    torch.set_num_threads(1)
    gc.freeze()  # else each fork would copy whatever the collector walks through
    growth = {"control": first_growth(lambda: bytearray(b"x") * (5 * MiB))}
    for name, (make, _) in BOMBS.items():
        body = make()
        growth[name] = first_growth(lambda body=body: refusal(body))  # type: ignore[misc]
    print(json.dumps(growth))


if __name__ == "__main__":
    main()
