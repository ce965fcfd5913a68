"""Header map of a message: its only valid encoding, and the checks that need no schema."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import msgpack  # type: ignore[import-untyped]

from nightsplit.shared.errors import Refused
from nightsplit.shared.wire.codecs import DTYPES, Codec, Entry, refusal
from nightsplit.shared.wire.message import WIRE_VERSION, Header, Kind, Scalar
from nightsplit.shared.wire.schema import Payload

MAX_HEADER = 256 * 1024
"""Bytes of a packed header."""
MAX_TENSORS = 2048
"""Tensors per message."""
MAX_SCALARS = 256
"""Scalars per message."""
MAX_DIMENSIONS = 8
"""Dimensions per tensor."""
MAX_NAME = 200
"""Characters of a run, sender or receiver name."""
PREFIX = 4
"""Bytes in front of the map that hold its length."""
INT64 = range(-(2**63), 2**63)

_NAMES = ("run", "sender", "receiver")
_COUNTERS = ("seq", "reply_to", "version", "fence")
_KEYS = ("wire", *_NAMES, "kind", *_COUNTERS, "scalars", "tensors")
_ROW = 7  # name, codec, zstd, dtype, shape, parameter, nbytes
_CODECS: dict[str, Codec] = {codec: codec for codec in get_args(Codec)}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Head:
    """Decoded header map of a body.

    Attributes:
        header: header fields.
        payload: schema of the message's kind; None where it was not looked up.
        scalars: announced scalars by name.
        entries: announced tensors, up to the first that does not fit `payload`.
        end: offset of the first byte after the map.
        refusal: error that `read_body` raises: tensors that do not fit `payload`, or a kind without one.
    """

    header: Header
    payload: Payload | None
    scalars: dict[str, Scalar]
    entries: list[Entry]
    end: int
    refusal: Refused | None


def read_head(body: bytes, payload_of: Callable[[Header], Payload | None] = lambda header: None) -> Head:
    """Decode the header map of a body, without its tensors.

    `payload_of` returns the schema of a header's kind. Its Refused is kept in `Head.refusal`, since a message with a
    sequence number is refused only when its turn comes.

    Raises:
        Refused: 301, 302, 303, 305, 306 or 309: the map itself is invalid.
    """
    packed = _packed_header(body)
    try:
        return _parse(packed, payload_of)
    except Refused:
        raise
    except Exception as error:  # msgpack raises half a dozen types
        raise refusal(301, f"Its header cannot be read: {type(error).__name__} {error}.") from error


def pack_head(header: Header, scalars: Mapping[str, Scalar], entries: Sequence[Entry]) -> bytes:
    """Encode a header map; Refused 304 if a string is not valid text, 308 above a limit."""
    try:
        packer = _packer(header, scalars, len(entries))
        for entry in entries:
            packer.pack(_row(entry))
        packed = bytes(packer.bytes())
    except UnicodeEncodeError as error:
        raise refusal(304, f"A string is not valid text: {error.reason}.") from error
    if len(packed) > MAX_HEADER or len(entries) > MAX_TENSORS or len(scalars) > MAX_SCALARS:
        raise refusal(308, f"Header of {len(packed)} bytes and {len(entries)} tensors: above the limit.")
    if any(len(entry.shape) > MAX_DIMENSIONS for entry in entries):
        raise refusal(308, f"A tensor has more than {MAX_DIMENSIONS} dimensions.")
    return packed


def _packer(header: Header, scalars: Mapping[str, Scalar], tensors: int, size: int = 1024) -> Any:
    """Return a packer that holds a header up to its rows: keys in the order of `_KEYS`, scalars sorted by name."""
    names, counters = ([getattr(header, name) for name in fields] for fields in (_NAMES, _COUNTERS))
    values = [WIRE_VERSION, *names, header.kind.value, *counters, dict(sorted(scalars.items()))]
    packer = msgpack.Packer(autoreset=False, buf_size=size)
    packer.pack_map_header(len(_KEYS))
    for key, value in zip(_KEYS[:-1], values, strict=True):
        packer.pack(key)
        packer.pack(value)
    packer.pack(_KEYS[-1])
    packer.pack_array_header(tensors)
    return packer


def _row(entry: Entry) -> list[object]:
    dtype = _DTYPE_NAMES[entry.dtype]
    return [entry.name, entry.codec, entry.zstd, dtype, list(entry.shape), entry.parameter, entry.nbytes]


def _packed_header(body: bytes) -> memoryview:
    if len(body) <= PREFIX:
        raise refusal(301, f"It has {len(body)} bytes.")
    length = int.from_bytes(body[:PREFIX], "big")
    if not 0 < length <= MAX_HEADER:  # most likely no length at all, so 301 rather than 308
        raise refusal(301, f"Its first bytes announce a header of {length} bytes, the limit is {MAX_HEADER}.")
    if PREFIX + length > len(body):
        raise refusal(309, f"It ends inside its header, after {len(body)} of {PREFIX + length} bytes.")
    return memoryview(body)[PREFIX : PREFIX + length]


def _parse(packed: memoryview, payload_of: Callable[[Header], Payload | None]) -> Head:
    """Read the map field by field, first its version, the one field that all wire versions share.

    msgpack would allocate a list of any claimed length before reading one item, nested a thousand deep.
    So its limits are 0 items, and lists and maps are read explicitly where they belong.
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
    check_header(header)
    payload, refused = _look_up(header, payload_of)
    scalars = _scalars(reader)
    _expect(reader, "tensors")
    tensors = _length(reader.read_array_header(), MAX_TENSORS)
    packer = _packer(header, scalars, tensors, size)
    entries: list[Entry] = []
    for _ in range(tensors):
        entry = _entry(reader)
        packer.pack(_row(entry))
        if payload is not None and refused is None:
            refused = _misfit(entry.name, entries, payload)
            entries.append(entry)
    if packer.getbuffer() != packed:
        raise refusal(301, "Its header is not encoded as nightsplit encodes it (a repeated field?).")
    return Head(header, payload, scalars, entries, PREFIX + size, refused)


def _look_up(header: Header, payload_of: Callable[[Header], Payload | None]) -> tuple[Payload | None, Refused | None]:
    try:
        return payload_of(header), None
    except Refused as refused:
        return None, refused


def _expect(reader: Any, key: str) -> None:
    if reader.unpack() != key:
        raise refusal(301, f"Its header has no {key} where it belongs.")


def _length(claimed: int, limit: int) -> int:
    if claimed > limit:
        raise refusal(301, f"Its header has a list or map of {claimed} items, the limit is {limit}.")
    return claimed


def _kind(value: object) -> Kind:
    if type(value) is not str or value not in {kind.value for kind in Kind}:
        raise refusal(303, f"It is of kind {quoted(value)}.")
    return Kind(value)


def quoted(value: object) -> str:
    """Quote an untrusted value, cut short."""
    # Cut first: the repr of a string may be ten times as long.
    if isinstance(value, str):
        return repr(value[:80])[:80]
    return repr(value) if isinstance(value, Scalar) else f"of type {type(value).__name__}"


def check_header(header: Header) -> None:
    """Check names and counts; Refused 301 names the first invalid one."""
    for name in _NAMES:
        value = getattr(header, name)
        if type(value) is not str or not 0 < len(value) <= MAX_NAME or not value.isprintable():
            raise refusal(301, f"Its {name} is {quoted(value)}, not a name of 1 to {MAX_NAME} characters.")
    for name in _COUNTERS:
        value = getattr(header, name)
        if type(value) is not int or value < 0 or value not in INT64:
            raise refusal(301, f"Its {name} is {quoted(value)}, not a count.")


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
    are_texts = type(name) is type(codec) is type(dtype) is str
    if not are_texts or type(zstd) is not bool or not type(parameter) is type(nbytes) is int or nbytes < 1:
        raise refusal(301, "A tensor's row in its header is malformed.")
    if dtype not in DTYPES or codec not in _CODECS:
        raise refusal(305, f"Tensor {quoted(name)} has dtype {quoted(dtype)}, codec {quoted(codec)}.")
    for length in shape:
        if type(length) is not int or length < 1:
            raise refusal(306, f"Tensor {quoted(name)} has a dimension that is not a number >= 1.")
    return Entry(name, _CODECS[codec], zstd, DTYPES[dtype], shape, parameter, nbytes)


def _misfit(name: str, before: Sequence[Entry], payload: Payload) -> Refused | None:
    if name not in payload.tensors:
        return refusal(304, f"Its contract has no tensor {quoted(name)}.")
    if before and name <= before[-1].name:
        return refusal(304, "Its tensors are repeated or out of order.")
    return None
