"""Mutants of messages that know how a message is built.

A mutant is a pure function of a seed and its number, so a campaign can be repeated, divided, and a
single mutant made again. Mutations come in four families: the bytes, the header map, the tensors'
values, the zstd frames. The last three keep everything else as it should be, so that they get past
the first check.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from random import Random
from typing import Any, get_args

import msgpack  # type: ignore[import-untyped]
import zstandard

from nightsplit.shared.wire import head
from nightsplit.shared.wire.codecs import DTYPES, Codec
from nightsplit.shared.wire.message import SERVER, Kind
from tests.faults.specimens import MARK, Specimen, rebuilt

NUMBERS = (
    *(0, 1, -1, 2, 7, 63, 64, 65, 127, 128, 255, 256, 4095, 4096, 4097, 65535, 65536, 2**20, 2**31 - 1, 2**31),
    *(2**32 - 1, 2**32, 2**53 + 1, 2**61 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, -2, -128, -(2**31), -(2**63)),
)
FLOATS = (0.0, -0.0, 0.5, 1e308, -1e308, 5e-324, float("nan"), float("inf"), float("-inf"))
WORDS = (
    *("", "x", "north", SERVER, "fuzz", "batch", "gradient", "smashed", "targets", "wire", "a\nb", "\0", "\u202e"),
    *("\ud800", "😀" * 20, "x" * 199, "x" * 201, *Kind, *DTYPES, *get_args(Codec), "float8_e4m3fn", "object"),
)
LEAVES = (None, True, False, b"", b"bytes", msgpack.ExtType(5, b"x"), msgpack.Timestamp(1, 2), *NUMBERS, *FLOATS)
FRAGMENTS = (
    b"\xc1",
    b"\xdd\x00\x00\x10\x00" * 3,
    b"\xdd\x00\x00\x10\x00" * 2000,
    b"\xdf\x00\x00\x10\x00" * 500,
    b"\x91" * 600 + b"\x90",
    b"\x91" * 5000,
    b"\x81\xa1a" * 400 + b"\x80",
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xc9\xff\xff\xff\xff\x01",
    b"\xc7\x00\x05",
    b"\xd6\xff\x00\x00\x00\x00",
    b"\xa4\xff\xfe\xfd\xfc",
    b"\xcc\x07",
    b"\xd3\x00\x00\x00\x00\x00\x00\x00\x07",
    b"\xca\x3f\x00\x00\x00",
    b"\xd9\x05north",
    b"\xdc\x00\x01\x01",
)
"""Things that are no msgpack, claim too much, nest too deep, or are spelled longer than needed."""


def anything(chance: Random, depth: int = 3) -> Any:
    """Some value that msgpack can pack."""
    what = chance.random()
    if depth and what < 0.1:
        return [anything(chance, depth - 1) for _ in range(chance.randrange(5))]
    if depth and what < 0.2:
        return {str(key): anything(chance, depth - 1) for key in range(chance.randrange(5))}
    return chance.choice(WORDS) if what < 0.5 else chance.choice(LEAVES)


def near(chance: Random, value: Any) -> Any:
    """A value of the same type, more likely to be believed."""
    match value:
        case bool():
            return not value
        case int():
            return chance.choice((*NUMBERS, value + 1, value - 1, value * 2, chance.randrange(64)))
        case float():
            return chance.choice((*FLOATS, -value, value * 1e300, chance.random()))
        case str():
            return chance.choice((*WORDS, value + "x", value[:-1], value.upper(), value[::-1]))
        case list():
            return chance.choice((value[::-1], value * 2, value[:-1], [], chance.sample(value, len(value))))
        case _:
            return dict(chance.sample(list(value.items()), len(value)))


def retyped(chance: Random, value: Any) -> Any:
    """The same in another type."""
    match value:
        case bool() | int():
            return chance.choice((float(value), str(value), bool(value), int(value), [value], msgpack.Timestamp(7)))
        case float():
            return chance.choice((0, 1, str(value), [value]))
        case str():
            return chance.choice((value.encode("utf-8", "replace"), [value], {value: 1}, len(value)))
        case list():
            return chance.choice((dict(enumerate(map(str, value))), str(value), len(value), [value]))
        case _:
            return chance.choice((list(value.items()), list(value), [value], str(len(value))))


# ── the bytes ───────────────────────────────────────────────────────────────────────────────────


def _flip(chance: Random, one: Specimen, other: Specimen) -> bytes:
    body = bytearray(one.body)
    for _ in range(chance.choice((1, 1, 1, 2, 4, 16))):
        body[chance.randrange(len(body))] ^= 1 << chance.randrange(8)
    return bytes(body)


def _overwrite(chance: Random, one: Specimen, other: Specimen) -> bytes:
    at, patch = chance.randrange(len(one.body)), chance.choice((b"\xff", bytes(8), b"\xff" * 8, chance.randbytes(4)))
    return one.body[:at] + patch + one.body[at + len(patch) :]


def _truncate(chance: Random, one: Specimen, other: Specimen) -> bytes:
    return one.body[: chance.randrange(len(one.body))]


def _extend(chance: Random, one: Specimen, other: Specimen) -> bytes:
    at = chance.choice((len(one.body), chance.randrange(len(one.body))))
    more = chance.choice((b"\0", bytes(64), chance.randbytes(chance.randrange(1, 200)), one.body, other.body))
    return one.body[:at] + more + one.body[at:]


def _cut_out(chance: Random, one: Specimen, other: Specimen) -> bytes:
    start, end = sorted(chance.randrange(len(one.body)) for _ in range(2))
    return one.body[:start] + one.body[end:]


def _splice(chance: Random, one: Specimen, other: Specimen) -> bytes:
    at = chance.randrange(len(one.body))
    return one.body[:at] + other.body[chance.choice((at, chance.randrange(len(other.body)))) :]


def _transplant(chance: Random, one: Specimen, other: Specimen) -> bytes:
    """The header of one message over the tensors of another, or with its scalars or rows."""
    fields, donor = one.fields, other.fields
    for key in ("kind", "scalars", "tensors"):
        if chance.random() < 0.4:
            fields[key] = donor[key]
    return rebuilt(fields, chance.choice((one, other)).parts)


def _length_lie(chance: Random, one: Specimen, other: Specimen) -> bytes:
    claimed = chance.choice((*NUMBERS, len(one.packed) + chance.randrange(-9, 10), len(one.body), head.MAX_HEADER))
    return (claimed % 2**32).to_bytes(4, "big") + one.body[4:]


# ── the header map ──────────────────────────────────────────────────────────────────────────────


def _fields(chance: Random, one: Specimen, other: Specimen) -> bytes:
    """One to three changes anywhere in the map."""
    fields, fragment = one.fields, b""
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        place: Any = fields
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = chance.choice(keys)
            if isinstance(place[key], dict | list) and place[key] and chance.random() < 0.8:
                place = place[key]
                continue
            match chance.randrange(8):
                case 0 | 1:
                    place[key] = near(chance, place[key]) if type(place[key]) in _NEAR else anything(chance)
                case 2:
                    place[key] = retyped(chance, place[key]) if type(place[key]) in _NEAR else anything(chance)
                case 3:
                    place[key] = anything(chance)
                case 4:
                    del place[key]
                case 5:
                    _add(chance, place)
                case 6:
                    place[key], fragment = MARK, chance.choice(FRAGMENTS)
                case _:
                    _reorder(chance, place)
            break
    return rebuilt(fields, one.parts, fragment)


_NEAR = (bool, int, float, str, list, dict)


def _add(chance: Random, place: Any) -> None:
    if isinstance(place, dict):
        place[chance.choice(WORDS)] = anything(chance)
    else:
        place.insert(chance.randrange(len(place) + 1), chance.choice((anything(chance), chance.choice(place))))


def _reorder(chance: Random, place: Any) -> None:
    if isinstance(place, dict):
        items = chance.sample(list(place.items()), len(place))
        place.clear()
        place.update(items)
    else:
        chance.shuffle(place)


def _relabel(chance: Random, one: Specimen, other: Specimen) -> bytes:
    """Header and scalars of the right types with other values: mostly a valid message."""
    fields = one.fields
    for key in chance.sample(("run", "sender", "receiver", "seq", "reply_to", "version", "fence"), 2):
        fields[key] = near(chance, fields[key])
    for name in fields["scalars"]:
        if chance.random() < 0.5:
            fields["scalars"][name] = near(chance, fields["scalars"][name])
    return rebuilt(fields, one.parts)


def _row(chance: Random, one: Specimen, other: Specimen) -> bytes:
    """A tensor's row lies about its codec, dtype, shape, parameter or length."""
    fields = one.fields
    if not fields["tensors"]:
        return _fields(chance, one, other)
    row = chance.choice(fields["tensors"])
    match chance.randrange(6):
        case 0:
            row[1] = chance.choice(get_args(Codec))
        case 1:
            row[2] = not row[2]
        case 2:
            row[3] = chance.choice(list(DTYPES))
        case 3:
            row[4] = _shape(chance, row[4])
        case 4:
            row[5] = chance.choice((*NUMBERS, *range(-130, 130, 13)))
        case _:
            row[6] = chance.choice((*NUMBERS, row[6] + 1, row[6] - 1, row[6] * 2, row[6] + 64))
    return rebuilt(fields, one.parts)


def _shape(chance: Random, shape: list[int]) -> list[Any]:
    huge = chance.choice(((2**31, 2**31, 4), (2**32, 2**32), (2**63, 2), (2**21,) * 3, (1,) * 70, (2**64 - 1,) * 64))
    return chance.choice(
        (
            [*shape, 1], shape[1:], shape[::-1], [0, *shape[1:]], [-length for length in shape], list(huge),
            [length * 2 for length in shape], [length + 1 for length in shape], [float(length) for length in shape],
            [near(chance, length) for length in shape], [],
        )
    )  # fmt: skip


# ── values and frames ───────────────────────────────────────────────────────────────────────────

_PATTERNS: dict[int, tuple[bytes, ...]] = {
    1: (b"\x00", b"\x01", b"\x02", b"\x7f", b"\x80", b"\xff"),
    2: tuple(struct.pack("<H", bits) for bits in (0x7C00, 0xFC00, 0x7E00, 0x7BFF, 0x7F80, 0xFFC0, 0x7F7F, 1, 0x8000)),
    4: tuple(struct.pack("<f", x) for x in (float("nan"), float("inf"), float("-inf"), 3.4e38, -3.4e38, 1e-45, -0.0)),
    8: tuple(struct.pack("<q", x) for x in (-(2**63), 2**63 - 1, -1, 3, 2**53 + 1))
    + tuple(struct.pack("<d", x) for x in (float("nan"), float("inf"), 1.7e308, 5e-324)),
}
"""By width: what stands at the edges of a type, NaN and infinity among it."""


def _values(chance: Random, one: Specimen, other: Specimen) -> bytes:
    """Other values in a tensor; everything around them is as it should be."""
    if not one.parts:
        return _relabel(chance, one, other)
    fields, parts = one.fields, list(one.parts)
    index = chance.randrange(len(parts))
    zstd = fields["tensors"][index][2]
    content = bytearray(zstandard.decompress(parts[index]) if zstd else parts[index])
    for _ in range(chance.choice((1, 1, 3))):
        width = chance.choice([width for width in _PATTERNS if width <= len(content)])
        at = chance.randrange(len(content) // width) * width
        content[at : at + width] = chance.choice((*_PATTERNS[width], chance.randbytes(width)))
    parts[index] = zstandard.ZstdCompressor(level=1).compress(content) if zstd else bytes(content)
    fields["tensors"][index][6] = len(parts[index])
    return rebuilt(fields, parts)


def _frame(chance: Random, one: Specimen, other: Specimen) -> bytes:
    """A zstd frame that is damaged, another, more than one, or states another size."""
    fields, parts = one.fields, list(one.parts)
    compressed = [index for index, row in enumerate(fields["tensors"]) if row[2]]
    if not compressed:
        return _row(chance, one, other)
    index = chance.choice(compressed)
    parts[index] = chance.choice(_FRAMES)(chance, parts[index], zstandard.decompress(parts[index]))
    fields["tensors"][index][6] = len(parts[index])
    return rebuilt(fields, parts)


def _flipped_frame(chance: Random, frame: bytes, content: bytes) -> bytes:
    at = chance.choice((chance.randrange(len(frame)), chance.randrange(min(12, len(frame)))))
    return frame[:at] + bytes([frame[at] ^ 1 << chance.randrange(8)]) + frame[at + 1 :]


def _unsized(content: bytes) -> bytes:
    stream = zstandard.ZstdCompressor(level=1).compressobj()
    return stream.compress(content) + stream.flush()


_BOMB = zstandard.ZstdCompressor(level=1).compress(bytes(2**24))
_FRAMES: tuple[Callable[[Random, bytes, bytes], bytes], ...] = (
    _flipped_frame,
    _flipped_frame,
    lambda chance, frame, content: frame[: chance.randrange(1, len(frame))],
    lambda chance, frame, content: frame + frame,
    lambda chance, frame, content: frame + chance.randbytes(3),
    lambda chance, frame, content: b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + frame,  # a skippable frame in front
    lambda chance, frame, content: _unsized(content),
    lambda chance, frame, content: _BOMB,
    lambda chance, frame, content: zstandard.compress(content + b"\0"),
    lambda chance, frame, content: zstandard.compress(content[:-1]),
    lambda chance, frame, content: zstandard.compress(content, level=19),
    lambda chance, frame, content: zstandard.ZstdCompressor(write_checksum=True).compress(content),
    lambda chance, frame, content: chance.randbytes(len(frame)),
    lambda chance, frame, content: content,
)

Mutation = Callable[[Random, Specimen, Specimen], bytes]
MUTATIONS: tuple[Mutation, ...] = (
    _flip, _flip, _overwrite, _truncate, _extend, _cut_out, _splice, _transplant, _length_lie,
    _fields, _fields, _fields, _fields, _relabel, _row, _row, _row, _values, _values, _values, _frame, _frame,
)  # fmt: skip
"""Each as often as it stands here."""


def mutant(good: list[Specimen], seed: int, number: int) -> tuple[Specimen, str, bytes]:
    """Mutant `number` of a campaign: what it was made of, by which mutation, and its bytes."""
    chance = Random(seed * 2**40 + number)
    one, other = chance.choice(good), chance.choice(good)
    mutation = chance.choice(MUTATIONS)
    return one, mutation.__name__.strip("_"), mutation(chance, one, other)
