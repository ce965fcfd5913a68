"""Bytes <-> Message. `docs/wire.md` draws the format and lists what is refused with which number.

    0                  4                      64·a           64·b
    ┌──────────────────┬────────────────┬─────┬────────┬─────┬────────┐
    │ length of header │ one msgpack map│ 0…0 │ tensor │ 0…0 │ tensor │
    └──────────────────┴────────────────┴─────┴────────┴─────┴────────┘

Every part after the header starts at a multiple of 64 and gaps hold zeros; nothing follows the
last part. A header has exactly one spelling: it must pack back into the bytes it was read from.
All sizes are checked before anything is decoded or allocated.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import msgpack  # type: ignore[import-untyped]
import torch

from nightsplit.shared.errors import Refused
from nightsplit.shared.wire import codecs as tensors
from nightsplit.shared.wire.codecs import DTYPES, Entry, refusal
from nightsplit.shared.wire.message import WIRE_VERSION, Header, Kind, Message, Scalar
from nightsplit.shared.wire.schema import Codec, Payload, TensorSpec

ALIGNMENT = 64
MAX_HEADER = 256 * 1024
"""Bytes of the packed header."""
MAX_TENSORS = 2048
"""Of a message."""
MAX_SCALARS = 256
"""Of a message."""
MAX_DIMENSIONS = 8
"""Of a tensor."""
MAX_EXPANSION = 8
"""All tensors of a message take at most this many times `max_bytes` once decoded."""
MAX_NAME = 200
"""Characters of a run, sender or receiver."""

_PREFIX = 4
_NAMES = ("run", "sender", "receiver")
_COUNTERS = ("seq", "reply_to", "version", "fence")
_KEYS = ("wire", *_NAMES, "kind", *_COUNTERS, "scalars", "tensors")
_ROW = 7  # name, codec, zstd, dtype, shape, parameter, nbytes
_INT64 = range(-(2**63), 2**63)
_CODECS: dict[str, Codec] = {codec: codec for codec in get_args(Codec)}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class _Envelope:
    """The header map, checked by itself; of the payload, only that each tensor is one of it. `end` is an offset."""

    header: Header
    scalars: dict[str, Scalar]
    entries: list[Entry]
    end: int


def encode(message: Message, payload: Payload, max_bytes: int) -> list[bytes | memoryview]:
    """Turn a message into pieces that make the body when joined.

    Pieces may be views of the tensors' own memory: these must not be written to until the message
    has been sent. Equal messages give equal bytes.

    Args:
        message: CPU tensors and scalars exactly as `payload` says.
        payload: the contract of the message's kind.
        max_bytes: largest body that the broker takes.

    Raises:
        Refused: 301 a header field, 304-307 the message violates its payload, 308 a limit. All are
            bugs or settings of the sender.
    """
    _check_header(message.header)
    _check_scalars(message.scalars, payload)
    _check_tensors({name: (t.dtype, tuple(t.shape)) for name, t in message.tensors.items()}, payload)
    encoded = [
        tensors.encode(name, message.tensors[name], spec.codec, spec.zstd)
        for name, spec in sorted(payload.tensors.items())
    ]
    entries = [entry for entry, _ in encoded]
    _check_decoded_size(entries, max_bytes)
    header = _pack(message.header, message.scalars, entries)
    if len(header) > MAX_HEADER or len(entries) > MAX_TENSORS or len(message.scalars) > MAX_SCALARS:
        raise refusal(308, f"Header of {len(header)} bytes and {len(entries)} tensors: above the limit.")
    if any(len(entry.shape) > MAX_DIMENSIONS for entry in entries):
        raise refusal(308, f"A tensor has more than {MAX_DIMENSIONS} dimensions.")
    pieces: list[bytes | memoryview] = [len(header).to_bytes(_PREFIX, "big") + header]
    end = len(pieces[0])
    for _, data in encoded:
        pieces += [bytes(-end % ALIGNMENT), data]
        end += -end % ALIGNMENT + len(data)
    _check_size(end, max_bytes)
    return [piece for piece in pieces if piece]


def peek(body: bytes) -> Header:
    """The header alone, to find the payload that `decode` needs. Touches no tensor.

    Raises:
        Refused: 301, 302, 303, 305, 306 or 309, all about the header itself.
    """
    return _read(body, None).header


def decode(body: bytes, payload: Payload, max_bytes: int) -> Message:
    """Turn a body back into the message it was made from.

    Tensors of codec "raw" and "fp32" without zstd are views of `body`, never to be written in place.

    Args:
        body: anything at all.
        payload: the contract of the kind that `peek` found.
        max_bytes: a larger body is refused; all tensors decoded take at most 8 times as much.

    Raises:
        Refused: 301-309 or 311, and never anything else, whatever the bytes are.
    """
    _check_size(len(body), max_bytes)
    envelope = _read(body, payload)
    entries = envelope.entries
    _check_scalars(envelope.scalars, payload)
    _check_tensors({entry.name: (entry.dtype, entry.shape) for entry in entries}, payload)
    for entry in entries:
        _check_codec(entry, payload.tensors[entry.name])
    _check_decoded_size(entries, max_bytes)
    offsets = list(_offsets(body, envelope))
    return Message(
        envelope.header,
        {entry.name: tensors.decode(entry, body, at) for entry, at in zip(entries, offsets, strict=True)},
        envelope.scalars,
    )


# ── the header map ──────────────────────────────────────────────────────────────────────────────


def _pack(header: Header, scalars: Mapping[str, Scalar], entries: Sequence[Entry]) -> bytes:
    try:
        packer = _packer(header, scalars, len(entries))
        for entry in entries:
            packer.pack(_row(entry))
        return bytes(packer.bytes())
    except UnicodeEncodeError as error:
        raise refusal(304, f"A string is not valid text: {error.reason}.") from error


def _packer(header: Header, scalars: Mapping[str, Scalar], tensors: int, size: int = 1024) -> Any:
    """The one spelling of a header, up to its rows: keys in the order of `_KEYS`, scalars and tensors by name."""
    fields = [
        WIRE_VERSION,
        *(getattr(header, name) for name in _NAMES),
        header.kind.value,
        *(getattr(header, name) for name in _COUNTERS),
        dict(sorted(scalars.items())),
    ]
    packer = msgpack.Packer(autoreset=False, buf_size=size)
    packer.pack_map_header(len(_KEYS))
    for key, value in zip(_KEYS, fields, strict=False):
        packer.pack(key)
        packer.pack(value)
    packer.pack(_KEYS[-1])
    packer.pack_array_header(tensors)
    return packer


def _row(entry: Entry) -> list[object]:
    dtype = _DTYPE_NAMES[entry.dtype]
    return [entry.name, entry.codec, entry.zstd, dtype, list(entry.shape), entry.parameter, entry.nbytes]


def _read(body: bytes, payload: Payload | None) -> _Envelope:
    """Check the header map. Rows of tensors are kept only where there is a payload, and only those it names."""
    packed = _packed_header(body)
    try:
        return _parse(packed, payload)
    except Refused:
        raise
    except Exception as error:  # msgpack raises half a dozen types
        raise refusal(301, f"Its header cannot be read: {type(error).__name__} {error}.") from error


def _packed_header(body: bytes) -> memoryview:
    if len(body) <= _PREFIX:
        raise refusal(301, f"It has {len(body)} bytes.")
    length = int.from_bytes(body[:_PREFIX], "big")
    if not 0 < length <= MAX_HEADER:  # most likely no length at all, so 301 rather than 308
        raise refusal(301, f"Its first bytes announce a header of {length} bytes, the limit is {MAX_HEADER}.")
    if _PREFIX + length > len(body):
        raise refusal(309, f"It ends inside its header, after {len(body)} of {_PREFIX + length} bytes.")
    return memoryview(body)[_PREFIX : _PREFIX + length]


def _parse(packed: memoryview, payload: Payload | None) -> _Envelope:
    """Read the map piece by piece: its version first, the one field that all wire versions have in common.

    Left alone, msgpack allocates a list of any length that is claimed before it has read one item, a
    thousand lists deep. So it may make none by itself (0 items): lists and maps are read where they belong.
    """
    size = len(packed)
    reader = msgpack.Unpacker(raw=False, read_size=size, max_buffer_size=size, max_array_len=0, max_map_len=0)
    reader.feed(packed)
    count = reader.read_map_header()
    if reader.unpack() != "wire" or type(version := reader.unpack()) is not int:
        raise refusal(301, "It does not begin with a nightsplit header.")
    if version != WIRE_VERSION:
        raise refusal(302, f"It has wire version {version}, this worker reads {WIRE_VERSION}.")
    if count != len(_KEYS):
        raise refusal(301, f"Its header has {count} fields, a nightsplit header {len(_KEYS)}.")
    fields = {}
    for key in (*_NAMES, "kind", *_COUNTERS):
        _expect(reader, key)
        fields[key] = reader.unpack()
    header = Header(**fields | {"kind": _kind(fields["kind"])})
    _check_header(header)
    scalars = _scalars(reader)
    _expect(reader, "tensors")
    tensors = _length(reader.read_array_header(), MAX_TENSORS)
    packer = _packer(header, scalars, tensors, size)
    entries: list[Entry] = []
    for _ in range(tensors):
        entry = _entry(reader)
        packer.pack(_row(entry))
        if payload is not None:
            _check_name(entry.name, entries, payload)
            entries.append(entry)
    if packer.getbuffer() != packed:
        raise refusal(301, "Its header is not spelled as nightsplit spells it (a repeated field?).")
    return _Envelope(header, scalars, entries, _PREFIX + size)


def _expect(reader: Any, key: str) -> None:
    if reader.unpack() != key:
        raise refusal(301, f"Its header has no {key} where it belongs.")


def _length(claimed: int, limit: int) -> int:
    if claimed > limit:
        raise refusal(301, f"Its header has a list or map of {claimed} items, the limit is {limit}.")
    return claimed


def _kind(value: object) -> Kind:
    if type(value) is not str or value not in {kind.value for kind in Kind}:
        raise refusal(303, f"It is of kind {_shown(value)}.")
    return Kind(value)


def _shown(value: object) -> str:
    # Cut first: the repr of a string may be ten times as long.
    if isinstance(value, str):
        return repr(value[:80])[:80]
    return repr(value) if isinstance(value, Scalar) else f"of type {type(value).__name__}"


def _check_header(header: Header) -> None:
    for name in _NAMES:
        value = getattr(header, name)
        if type(value) is not str or not 0 < len(value) <= MAX_NAME or not value.isprintable():
            raise refusal(301, f"Its {name} is {_shown(value)}, not a name of 1 to {MAX_NAME} characters.")
    for name in _COUNTERS:
        value = getattr(header, name)
        if type(value) is not int or value < 0 or value not in _INT64:
            raise refusal(301, f"Its {name} is {_shown(value)}, not a count.")


def _scalars(reader: Any) -> dict[str, Scalar]:
    _expect(reader, "scalars")
    scalars: dict[str, Scalar] = {}
    for _ in range(_length(reader.read_map_header(), MAX_SCALARS)):
        name, value = reader.unpack(), reader.unpack()
        if type(name) is not str or type(value) not in get_args(Scalar):
            raise refusal(301, "Its scalars are not named numbers or strings.")
        scalars[name] = value
    return scalars


def _entry(reader: Any) -> Entry:
    unpack = reader.unpack
    if reader.read_array_header() != _ROW:
        raise refusal(301, "A tensor's row in its header is malformed.")
    name, codec, zstd, dtype = unpack(), unpack(), unpack(), unpack()
    shape = tuple([unpack() for _ in range(_length(reader.read_array_header(), MAX_DIMENSIONS))])
    parameter, nbytes = unpack(), unpack()
    texts = type(name) is type(codec) is type(dtype) is str
    if not texts or type(zstd) is not bool or not type(parameter) is type(nbytes) is int or nbytes < 1:
        raise refusal(301, "A tensor's row in its header is malformed.")
    if dtype not in DTYPES or codec not in _CODECS:
        raise refusal(305, f"Tensor {_shown(name)} has dtype {_shown(dtype)}, codec {_shown(codec)}.")
    for length in shape:
        if type(length) is not int or length < 1:
            raise refusal(306, f"Tensor {_shown(name)} has a dimension that is no number >= 1.")
    return Entry(name, _CODECS[codec], zstd, DTYPES[dtype], shape, parameter, nbytes)


# ── against the payload ─────────────────────────────────────────────────────────────────────────


def _check_names(what: str, found: Mapping[str, object], expected: Mapping[str, object]) -> None:
    if found.keys() != expected.keys():
        missing, extra = (
            [name[:80] for name in heapq.nsmallest(5, names)]
            for names in (expected.keys() - found.keys(), found.keys() - expected.keys())
        )
        raise refusal(304, f"Its {what} lack {missing!r:.200} and have {extra!r:.200} on top.")


def _check_scalars(scalars: Mapping[str, Scalar], payload: Payload) -> None:
    """Names and exact types (a bool is no int, an int no float), and finite values."""
    _check_names("scalars", scalars, payload.scalars)
    for name, value in scalars.items():
        expected = payload.scalars[name]
        if type(value) is not expected:
            raise refusal(304, f"Scalar '{name}' has type {type(value).__name__}, not {expected.__name__}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise refusal(307, f"Scalar '{name}' is {value}.")
        if isinstance(value, int) and value not in _INT64:
            raise refusal(308, f"Scalar '{name}' does not fit into 64 bits.")


def _check_tensors(found: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], payload: Payload) -> None:
    """Names, dtypes and shapes; a named dimension has one length throughout the message."""
    _check_names("tensors", found, payload.tensors)
    bound: dict[str, int] = {}
    for name, (dtype, shape) in found.items():
        spec = payload.tensors[name]
        if dtype != spec.dtype:
            raise refusal(305, f"Tensor '{name}' has {dtype}, not {spec.dtype}.")
        expected = tuple(
            bound.setdefault(want, have) if isinstance(want, str) else want
            for want, have in zip(spec.shape, shape, strict=False)
        )
        if len(shape) != len(spec.shape) or shape != expected:
            raise refusal(306, f"Tensor '{name}' has shape {shape!r:.80}, not {spec.shape} where {bound}.")


def _check_name(name: str, before: Sequence[Entry], payload: Payload) -> None:
    if name not in payload.tensors:
        raise refusal(304, f"Its contract has no tensor {_shown(name)}.")
    if before and name <= before[-1].name:
        raise refusal(304, "Its tensors are repeated or out of order.")


def _check_codec(entry: Entry, spec: TensorSpec) -> None:
    if (entry.codec, entry.zstd) != (spec.codec, spec.zstd):
        raise refusal(305, f"Tensor '{entry.name}' travels as {entry.codec}, not as {spec.codec}.")


# ── sizes ───────────────────────────────────────────────────────────────────────────────────────


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise refusal(308, f"It has {size} bytes, the limit is {max_bytes}.")


def _check_decoded_size(entries: Sequence[Entry], max_bytes: int) -> None:
    size, limit = sum(entry.decoded_size for entry in entries), MAX_EXPANSION * max_bytes
    if size > limit:
        raise refusal(308, f"Its tensors take {size} bytes in memory, the limit is {limit}.")


def _offsets(body: bytes, envelope: _Envelope) -> Iterator[int]:
    """Where each tensor starts, once the gaps and the end have been found right."""
    end = envelope.end
    for entry in envelope.entries:
        start = end + -end % ALIGNMENT
        if body[end:start].strip(b"\0"):
            raise refusal(309, f"The gap before tensor '{entry.name}' is not empty.")
        yield start
        end = start + entry.nbytes
    if end != len(body):
        raise refusal(309, f"It has {len(body)} bytes, its header accounts for {end}.")
