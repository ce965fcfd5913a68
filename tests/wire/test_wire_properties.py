"""Whatever is sent comes back, and whatever arrives is a message or a `Refused`, in bounded time."""

from __future__ import annotations

import time
from typing import Any, get_args

import msgpack
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nightsplit.shared.errors import Refused
from nightsplit.shared.wire import format as wire
from nightsplit.shared.wire import head
from nightsplit.shared.wire.codecs import DTYPES, Codec
from nightsplit.shared.wire.message import Header, Kind, Message
from nightsplit.shared.wire.schema import Payload, ScalarSpec, TensorSpec

MIB = 2**20
LIMIT = 64 * 1024
quick = settings(
    derandomize=True,
    max_examples=250,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)

PAYLOAD = Payload(
    Kind.NOTED,
    {
        "a": TensorSpec(torch.float32, ("batch", 3, 4), "fp16"),
        "b": TensorSpec(torch.float32, ("batch", 3, 4), "int8", zstd=True),
        "c": TensorSpec(torch.bool, ("batch",)),
        "d": TensorSpec(torch.float32, (5,)),
    },
    {name: ScalarSpec(of) for name, of in {"loss": float, "step": int, "last": bool, "note": str}.items()},
)


def good(batch: int = 4) -> bytes:
    """A message that holds one tensor of each way to fail."""
    values = torch.arange(batch * 12, dtype=torch.float32).reshape(batch, 3, 4)
    tensors = {"a": values, "b": values.sin(), "c": torch.arange(batch) > 1, "d": torch.ones(5)}
    header = Header("run", "site", "server", Kind.SMASHED, seq=3, version=2)
    sent = Message(header, tensors, {"loss": 1.5, "step": 2, "last": True, "note": "é"})
    return b"".join(wire.encode(sent, PAYLOAD, LIMIT))


GOOD = good()


def read(raw: bytes) -> Any:
    """The message in `raw`, or why it was refused."""
    try:
        head.read_head(raw)
        return wire.decode(raw, PAYLOAD, LIMIT)
    except Refused as refused:
        return refused


def survives(raw: bytes) -> None:
    """Reading `raw` gives a message that honours its contract, or `Refused`, at once."""
    started = time.thread_time()
    outcome = read(raw)
    if isinstance(outcome, Refused):
        assert 301 <= outcome.number <= 311
        assert len(str(outcome)) < 2000
    else:
        for name, spec in PAYLOAD.tensors.items():
            tensor = outcome.tensors[name]
            assert tensor.dtype == spec.dtype
            assert len(tensor.shape) == len(spec.shape)
            assert torch.isfinite(tensor).all()
        assert read(b"".join(wire.encode(outcome, PAYLOAD, LIMIT))).header == outcome.header
    assert time.thread_time() - started < 1.0


# ── what is sent comes back ─────────────────────────────────────────────────────────────────────

shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@st.composite
def sendable(draw: st.DrawFn) -> tuple[torch.Tensor, TensorSpec]:
    codec: Codec = draw(st.sampled_from(get_args(Codec)))
    dtype = draw(st.sampled_from(list(DTYPES.values()))) if codec == "raw" else torch.float32
    shape = draw(shapes)
    seed = draw(st.integers(0, 2**31))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if dtype.is_floating_point:
        values = values * 10.0 ** draw(st.integers(-4, 3) if dtype == torch.float16 else st.integers(-40, 37))
    else:
        values = (values * 50).abs().clamp(max=100)
    return values.to(dtype), TensorSpec(dtype, shape, codec, draw(st.booleans()))


names = st.text(st.characters(codec="utf-8"), max_size=8)
counts = st.integers(0, 2**63 - 1)
people = st.from_regex(r"[a-z0-9_.-]{1,30}", fullmatch=True)
headers = st.builds(Header, people, people, people, st.sampled_from(Kind), counts, counts, counts, counts)
scalars = st.dictionaries(
    names,
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"), max_size=20),
    max_size=5,
)


@quick
@given(headers, scalars, st.dictionaries(names, sendable(), max_size=4))
def test_round_trip(header: Header, facts: Any, content: dict[str, tuple[torch.Tensor, TensorSpec]]) -> None:
    payload = Payload(
        Kind.NOTED,
        {name: spec for name, (_, spec) in content.items()},
        {name: ScalarSpec(type(fact)) for name, fact in facts.items()},
    )
    sent = Message(header, {name: tensor for name, (tensor, _) in content.items()}, facts)
    raw = b"".join(wire.encode(sent, payload, MIB))
    assert raw == b"".join(wire.encode(sent, payload, MIB))
    got = wire.decode(raw, payload, MIB)
    assert head.read_head(raw).header == got.header == header
    assert got.scalars == facts
    for name, (tensor, spec) in content.items():
        back = got.tensors[name]
        assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
        if spec.codec in ("raw", "fp32"):
            assert torch.equal(back, tensor)
        else:
            assert (back - tensor).abs().max() <= tensor.abs().max() * 0.004 + 1e-38


# ── what arrives is a message or refused ────────────────────────────────────────────────────────


@quick
@given(st.binary(max_size=300))
def test_any_bytes(raw: bytes) -> None:
    survives(raw)


@quick
@given(st.binary(max_size=200), st.binary(max_size=100))
def test_any_header_of_the_right_length(packed: bytes, rest: bytes) -> None:
    survives(len(packed).to_bytes(4, "big") + packed + rest)


@quick
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bits(flips: list[tuple[int, int]]) -> None:
    raw = bytearray(GOOD)
    for at, mask in flips:
        raw[at] ^= mask
    survives(bytes(raw))


def test_every_single_byte_changed() -> None:
    for at in range(len(GOOD)):
        for mask in (0x01, 0x80, 0xFF):
            survives(GOOD[:at] + bytes([GOOD[at] ^ mask]) + GOOD[at + 1 :])


def test_truncated_anywhere() -> None:
    assert all(isinstance(read(GOOD[:end]), Refused) for end in range(len(GOOD)))


@quick
@given(st.integers(0, len(GOOD)), st.integers(0, len(GOOD)), st.binary(max_size=80), st.sampled_from([1, 4, 9]))
def test_spliced(cut: int, resume: int, between: bytes, batch: int) -> None:
    survives(GOOD[:cut] + between + good(batch)[resume:])


leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=10)
    | st.binary(max_size=10)
    | st.sampled_from(
        ["float32", "raw", "int8", "batch", "a", "smashed", msgpack.ExtType(3, b"x"), msgpack.Timestamp(1)]
    )
)
anything = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
)


@quick
@given(st.data())
def test_a_header_with_something_else_in_one_place(data: st.DataObject) -> None:
    length = int.from_bytes(GOOD[:4], "big")
    fields = msgpack.unpackb(GOOD[4 : 4 + length])
    place: Any = fields
    while True:
        key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
        if not (isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans())):
            break
        place = place[key]
    place[key] = data.draw(anything)
    packed = msgpack.packb(fields)
    start = len(packed).to_bytes(4, "big") + packed
    survives(start + bytes(-len(start) % 64) + GOOD[4 + length + -(4 + length) % 64 :])
