"""Encoding and decoding of whole messages. `docs/reference/wire.md` describes the format and all refusals.

    0                  4                      64·a           64·b
    ┌──────────────────┬────────────────┬─────┬────────┬─────┬────────┐
    │ length of header │ one msgpack map│ 0…0 │ tensor │ 0…0 │ tensor │
    └──────────────────┴────────────────┴─────┴────────┴─────┴────────┘

Every part after the header starts at a multiple of 64 and gaps hold zeros; nothing follows the
last part. A header has exactly one encoding: it must pack back into the bytes it was read from.
All sizes are checked before anything is decoded or allocated.
"""

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence

import torch

from nightsplit.shared.wire import codecs
from nightsplit.shared.wire.codecs import Entry, refusal
from nightsplit.shared.wire.head import INT64, PREFIX, Head, check_header, pack_head, read_head
from nightsplit.shared.wire.message import Message, Scalar
from nightsplit.shared.wire.schema import Payload

ALIGNMENT = 64
MAX_EXPANSION = 8
"""Limit of all decoded tensors of a message, as a multiple of `max_bytes`."""


def encode(message: Message, payload: Payload, max_bytes: int) -> list[bytes | memoryview]:
    """Encode a message into pieces that form the body when joined.

    Pieces may be views of the tensors' own memory: these must not be written to until the message
    has been sent. Equal messages give equal bytes.

    Raises:
        Refused: 301 a header field, 304-307 the message violates its payload, 308 a limit. All are
            bugs or settings of the sender.
    """
    check_header(message.header)
    _check_scalars(message.scalars, payload)
    _check_tensors({name: (t.dtype, tuple(t.shape)) for name, t in message.tensors.items()}, payload)
    encoded = [
        codecs.encode(name, message.tensors[name], spec.codec, spec.zstd)
        for name, spec in sorted(payload.tensors.items())
    ]
    entries = [entry for entry, _ in encoded]
    _check_decoded_size(entries, max_bytes)
    header = pack_head(message.header, message.scalars, entries)
    pieces: list[bytes | memoryview] = [len(header).to_bytes(PREFIX, "big") + header]
    end = len(pieces[0])
    for _, data in encoded:
        pieces += [bytes(-end % ALIGNMENT), data]
        end += -end % ALIGNMENT + len(data)
    _check_size(end, max_bytes)
    return [piece for piece in pieces if piece]


def read_body(head: Head, body: bytes, max_bytes: int) -> Message:
    """Decode the rest of a body into the message that its head announces.

    Tensors of codec "raw" and "fp32" without zstd are views of `body`, never to be written in place. The body takes at
    most `max_bytes`, and all decoded tensors at most `MAX_EXPANSION` times as much.

    Raises:
        Refused: 303-309 or 311; no bytes raise any other error.
    """
    _check_size(len(body), max_bytes)
    if head.refusal is not None:
        raise head.refusal
    assert head.payload is not None, "a body is read against its schema"
    entries, payload = head.entries, head.payload
    _check_scalars(head.scalars, payload)
    _check_tensors({entry.name: (entry.dtype, entry.shape) for entry in entries}, payload)
    for entry in entries:
        spec = payload.tensors[entry.name]
        if (entry.codec, entry.zstd) != (spec.codec, spec.zstd):
            raise refusal(305, f"Tensor '{entry.name}' travels as {entry.codec}, not as {spec.codec}.")
    _check_decoded_size(entries, max_bytes)
    offsets = list(_offsets(body, head))  # all gaps are checked before any tensor is decoded
    tensors = {entry.name: codecs.decode(entry, body, at) for entry, at in zip(entries, offsets, strict=True)}
    return Message(head.header, tensors, head.scalars)


def decode(body: bytes, payload: Payload, max_bytes: int) -> Message:
    """Decode a body of a known kind: `read_head`, then `read_body`."""
    return read_body(read_head(body, lambda header: payload), body, max_bytes)


def _check_names(what: str, found: Mapping[str, object], expected: Mapping[str, object]) -> None:
    if found.keys() != expected.keys():
        missing = _first_names(expected.keys() - found.keys())
        extra = _first_names(found.keys() - expected.keys())
        raise refusal(304, f"Its {what} lack {missing!r:.200} and have the unknown {extra!r:.200}.")


def _first_names(names: set[str]) -> list[str]:
    return [name[:80] for name in heapq.nsmallest(5, names)]


def _check_scalars(scalars: Mapping[str, Scalar], payload: Payload) -> None:
    """Check names, exact types (a bool is no int, an int no float), finite values and limits."""
    _check_names("scalars", scalars, payload.scalars)
    for name, value in scalars.items():
        spec = payload.scalars[name]
        if type(value) is not spec.type:
            raise refusal(304, f"Scalar '{name}' has type {type(value).__name__}, not {spec.type.__name__}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise refusal(307, f"Scalar '{name}' is {value}.")
        if isinstance(value, int) and value not in INT64:
            raise refusal(308, f"Scalar '{name}' does not fit into 64 bits.")
        if isinstance(value, int | float) and not spec.low <= value <= spec.high:
            raise refusal(307, f"Scalar '{name}' is {value}, not within {spec.low:g} to {spec.high:g}.")


def _check_tensors(found: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], payload: Payload) -> None:
    """Check names, dtypes and shapes; a named dimension has one length throughout the message."""
    _check_names("tensors", found, payload.tensors)
    lengths: dict[str, int] = {}
    for name, (dtype, shape) in found.items():
        spec = payload.tensors[name]
        if dtype != spec.dtype:
            raise refusal(305, f"Tensor '{name}' has {dtype}, not {spec.dtype}.")
        expected = tuple(
            lengths.setdefault(want, have) if isinstance(want, str) else want
            for want, have in zip(spec.shape, shape, strict=False)
        )
        if len(shape) != len(spec.shape) or shape != expected:
            raise refusal(306, f"Tensor '{name}' has shape {shape!r:.80}, not {spec.shape} where {lengths}.")


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise refusal(308, f"It has {size} bytes, the limit is {max_bytes}.")


def _check_decoded_size(entries: Sequence[Entry], max_bytes: int) -> None:
    size, limit = sum(math.prod(e.shape) * e.dtype.itemsize for e in entries), MAX_EXPANSION * max_bytes
    if size > limit:
        raise refusal(308, f"Its tensors take {size} bytes in memory, the limit is {limit}.")


def _offsets(body: bytes, head: Head) -> Iterator[int]:
    """Yield the offset of each tensor; Refused 309 for a gap that is not empty, or a wrong end."""
    end = head.end
    for entry in head.entries:
        start = end + -end % ALIGNMENT
        if body[end:start].strip(b"\0"):
            raise refusal(309, f"The gap before tensor '{entry.name}' is not empty.")
        yield start
        end = start + entry.nbytes
    if end != len(body):
        raise refusal(309, f"It has {len(body)} bytes, its header accounts for {end}.")
