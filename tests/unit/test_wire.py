"""The wire format: round trip, layout, golden files, and one case per refusal.

`python tests/unit/test_wire.py` writes the golden files of the present `WIRE_VERSION` that do not
exist yet. Files of a published version are never written again: a new layout is a new version,
and its files stand beside the old ones.
"""

from __future__ import annotations

import pickle
import resource
import time
import tracemalloc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
import zstandard

from shared import wire
from shared.contract import Payload, TensorSpec
from shared.errors import Refused
from shared.message import WIRE_VERSION, Header, Kind, Message, Scalar

MIB = 2**20
GOLDEN = Path(__file__).parents[1] / "golden"
F32 = torch.float32
HEADER = Header("night-7", "st-mary", "server", Kind.SMASHED, seq=12, reply_to=3, version=9)
PAYLOAD = Payload(
    {
        "smashed": TensorSpec(F32, ("batch", 2, 4, 4), "fp16"),
        "labels": TensorSpec(torch.int64, ("batch",)),
        "mask": TensorSpec(torch.bool, ("batch", "classes")),
    },
    {"loss": float, "step": int, "last": bool, "note": str},
)
SCALARS: dict[str, Scalar] = {"loss": 0.5, "step": 3, "last": False, "note": "ä"}


def ramp(*shape: int) -> torch.Tensor:
    """Values that need no random generator, so that golden files hold for every torch."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count) * 37 % 101 - 50) / 64).reshape(shape)


def message(**changes: Any) -> Message:
    tensors = {"smashed": ramp(5, 2, 4, 4), "labels": torch.arange(5), "mask": ramp(5, 3) > 0}
    return replace(Message(HEADER, tensors, SCALARS), **changes)


def body(sent: Message | None = None, payload: Payload = PAYLOAD) -> bytes:
    return b"".join(wire.encode(sent or message(), payload, MIB))


def refused(number: int) -> pytest.RaisesExc[Refused]:
    return pytest.RaisesExc(Refused, check=lambda error: error.number == number)


def fields(raw: bytes) -> dict[str, Any]:
    parsed: dict[str, Any] = msgpack.unpackb(raw[4 : 4 + int.from_bytes(raw[:4], "big")])
    return parsed


def with_header(raw: bytes, header: Any) -> bytes:
    """`raw` with another header, packed or not; its tensor bytes stay."""
    old = 4 + int.from_bytes(raw[:4], "big")
    packed = header if isinstance(header, bytes) else msgpack.packb(header)
    new = len(packed).to_bytes(4, "big") + packed
    return new + bytes(-len(new) % 64) + raw[old + -old % 64 :]


def with_fields(**changes: Any) -> bytes:
    return with_header(body(), fields(body()) | changes)


def with_row(index: int, value: Any, tensor: int = 2) -> bytes:
    """A good body whose row for "smashed" (the third by name) has another value at `index`."""
    rows = fields(body())["tensors"]
    rows[tensor][index] = value
    return with_fields(tensors=rows)


def assert_refused(number: int, raw: bytes, payload: Payload = PAYLOAD) -> None:
    with refused(number):
        wire.decode(raw, payload, MIB)


# ── what works ──────────────────────────────────────────────────────────────────────────────────


def test_round_trip() -> None:
    sent = message()
    got = wire.decode(body(), PAYLOAD, MIB)
    assert got.header == sent.header
    assert wire.peek(body()) == sent.header
    assert got.scalars == sent.scalars
    assert {name: type(value) for name, value in got.scalars.items()} == PAYLOAD.scalars
    assert got.tensors.keys() == sent.tensors.keys()
    assert all(torch.equal(got.tensors[name], sent.tensors[name]) for name in sent.tensors)


@pytest.mark.parametrize("kind", list(Kind))
def test_every_kind_and_nothing_inside(kind: Kind) -> None:
    raw = body(Message(replace(HEADER, kind=kind)), Payload())
    assert wire.peek(raw) == wire.decode(raw, Payload(), MIB).header == replace(HEADER, kind=kind)
    assert type(wire.peek(raw).kind) is Kind


def test_equal_messages_give_equal_bytes_in_any_order() -> None:
    sent = message()
    backwards = replace(
        sent,
        tensors=dict(reversed(sent.tensors.items())),
        scalars=dict(reversed(sent.scalars.items())),
    )
    other = Payload(dict(reversed(PAYLOAD.tensors.items())), dict(reversed(PAYLOAD.scalars.items())))
    assert body(backwards) == body(sent) == body(sent, other)


def test_only_the_fence_differs() -> None:
    later = body(message(header=replace(HEADER, fence=5)))
    assert later != body()
    assert with_header(later, fields(later) | {"fence": 0}) == body()


def test_every_tensor_starts_at_a_multiple_of_64_and_nothing_follows_the_last() -> None:
    raw = body()
    at = 4 + int.from_bytes(raw[:4], "big")
    for name, _, _, _, _, _, nbytes in fields(raw)["tensors"]:
        start = (at + 63) // 64 * 64
        assert raw[at:start] == bytes(start - at), name
        at = start + nbytes
    assert at == len(raw)


@pytest.mark.parametrize("codec", ["raw", "fp32"])
def test_decoding_copies_nothing(codec: Any) -> None:
    payload = Payload({"a": TensorSpec(F32, ("n", 8), codec), "b": TensorSpec(torch.int64, (3,))})
    raw = body(Message(HEADER, {"a": ramp(1000, 8), "b": torch.arange(3)}), payload)
    start = torch.frombuffer(raw, dtype=torch.uint8).data_ptr()
    for tensor in wire.decode(raw, payload, MIB).tensors.values():
        offset = tensor.data_ptr() - start
        assert offset % 64 == 0
        assert 0 < offset <= len(raw) - tensor.nbytes


def test_encoding_hands_out_the_tensors_own_memory() -> None:
    tensor = ramp(1000)
    pieces = wire.encode(Message(HEADER, {"a": tensor}), Payload({"a": TensorSpec(F32, (1000,))}), MIB)
    assert isinstance(pieces[-1], memoryview)
    assert torch.frombuffer(pieces[-1], dtype=F32).data_ptr() == tensor.data_ptr()


def test_hundreds_of_tensors_fit() -> None:
    payload = Payload({f"layer{i}.block.conv.weight": TensorSpec(F32, (2, 2)) for i in range(2000)})
    sent = Message(HEADER, {name: ramp(2, 2) for name in payload.tensors})
    assert len(wire.decode(body(sent, payload), payload, MIB).tensors) == 2000


# ── what is refused, number by number ───────────────────────────────────────────────────────────


class Evil:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("a pickle was loaded",))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("content", [Evil(), {"wire": 1}, ramp(5)], ids=["evil", "map", "tensor"])
def test_301_pickle(content: object, protocol: int) -> None:
    raw = pickle.dumps(content, protocol)
    assert_refused(301, raw)
    with refused(301):
        wire.peek(raw)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\0\0\0\0",
        b"\0\0\0\0\0",
        b"{}",
        b"GET / HTTP/1.1\r\n\r\n",
        (wire.MAX_HEADER + 1).to_bytes(4, "big") + bytes(wire.MAX_HEADER + 1),
    ],
)
def test_301_not_ours(raw: bytes) -> None:
    assert_refused(301, raw)


def nested(depth: int) -> bytes:
    return (b"\xdd" + wire.MAX_TENSORS.to_bytes(4, "big")) * depth


@pytest.mark.parametrize(
    "packed",
    [
        b"\xc1",
        b"\x81\xa4wire",
        b"\x81\xa4wire\x01\x00",
        b"\x93\x01\x02\x03",
        b"\x81\x01\x01",
        b"\x81\xc4\x04wire\x01",
        b"\x81\xa4wire\xc7\x00\x05",
        b"\x81\xa4wire\xd6\xff\0\0\0\0",
        b"\x81\xa4wir\xff\x01",
        b"\xdf\xff\xff\xff\xff",
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x91" * 100_000,
        nested(50_000),
        msgpack.packb({"wire": True}),
        msgpack.packb({"wire": "1"}),
        msgpack.packb({"wire": 1}),
        msgpack.packb({"version": 1}),
    ],
)
def test_301_not_a_header(packed: bytes) -> None:
    started = time.perf_counter()
    assert_refused(301, with_header(b"\0\0\0\0", packed))
    assert time.perf_counter() - started < 0.5


@pytest.mark.parametrize("claim", [wire.MAX_TENSORS + 1, 200_000])
def test_301_lists_that_claim_to_be_long_are_not_allocated(claim: int) -> None:
    raw = with_header(b"\0\0\0\0", (b"\xdd" + claim.to_bytes(4, "big")) * 50_000)
    tracemalloc.start()
    assert_refused(301, raw)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MIB


@pytest.mark.parametrize("depth", [1, 100, 500, 1000])
@pytest.mark.parametrize("field", ["wire", "run", "kind", "seq", "scalars", "tensors"])
def test_deep_nesting_inside_a_field(field: str, depth: int) -> None:
    value: Any = []
    for _ in range(depth):
        value = [value]
    packed = b"\x8b" + b"".join(
        msgpack.packb(key) + (b"\x91" * depth + b"\x90" if key == field else msgpack.packb(old))
        for key, old in fields(body()).items()
    )
    with pytest.raises(Refused) as caught:
        wire.decode(with_header(body(), packed), PAYLOAD, MIB)
    assert caught.value.number in (301, 303)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "changes",
    [
        {"run": ""},
        {"run": 5},
        {"run": "x" * 201},
        {"sender": "a\nb"},
        {"sender": b"bytes"},
        {"receiver": None},
        {"seq": -1},
        {"seq": 1.0},
        {"seq": True},
        {"seq": 2**63},
        {"version": "1"},
        {"reply_to": []},
        {"fence": -5},
        {"scalars": []},
        {"scalars": {"a": None}},
        {"scalars": {"a": [1]}},
        {"scalars": {b"a": 1}},
        {"scalars": {"a": msgpack.Timestamp(1)}},
        {"scalars": {"a": msgpack.ExtType(5, b"x")}},
        {"tensors": {}},
        {"tensors": [1]},
        {"tensors": [[]]},
        {"tensors": [["a", "raw", False, "float32", [1], 0]]},
        {"extra": 1},
    ],
    ids=str,
)
def test_301_fields(changes: dict[str, Any]) -> None:
    assert_refused(301, with_fields(**changes))


def test_301_missing_or_reordered_field() -> None:
    good = fields(body())
    assert with_header(body(), good) == body()
    assert_refused(301, with_header(body(), {key: good[key] for key in good if key != "fence"}))
    assert_refused(301, with_header(body(), {key: good[key] for key in reversed(good)}))


def test_301_a_header_has_one_spelling() -> None:
    packed = msgpack.packb(fields(body()))
    seq = msgpack.packb("seq") + b"\x0c"
    assert packed.count(seq) == 1
    assert_refused(301, with_header(body(), packed.replace(seq, msgpack.packb("seq") + b"\xcc\x0c")))
    assert_refused(301, with_header(body(), b"\x8c" + packed[1:].replace(seq, seq + seq)))
    assert_refused(301, with_header(body(), packed.replace(b"\x84\xa4last\xc2", b"\x85\xa4last\xc3\xa4last\xc2")))
    assert_refused(301, with_fields(scalars=dict(reversed(SCALARS.items()))))
    assert_refused(
        301,
        with_header(body(), packed.replace(msgpack.packb(0.5), msgpack.packb(0.5, use_single_float=True))),
    )


@pytest.mark.parametrize("changes", [{"sender": ""}, {"seq": -1}, {"version": 2**63}, {"run": 3}, {"seq": True}])
def test_301_also_when_sending(changes: dict[str, Any]) -> None:
    with refused(301):
        body(message(header=replace(HEADER, **changes)))


@pytest.mark.parametrize("version", [0, 2, -1, 2**64 - 1])
def test_302_wire_version(version: int) -> None:
    assert_refused(302, with_fields(wire=version))
    assert_refused(302, with_header(body(), {"wire": version, "unheard": "of"}))


@pytest.mark.parametrize("kind", ["", "SMASHED", "exec", 3, None, b"smashed"])
def test_303_kind(kind: object) -> None:
    assert_refused(303, with_fields(kind=kind))


@pytest.mark.parametrize(
    "scalars",
    [
        {},
        SCALARS | {"more": 1},
        SCALARS | {"step": True},
        SCALARS | {"step": 3.0},
        SCALARS | {"loss": 1},
        SCALARS | {"last": 0},
        SCALARS | {"note": 1},
    ],
    ids=str,
)
def test_304_scalars(scalars: Mapping[str, Scalar]) -> None:
    assert_refused(304, with_fields(scalars=dict(sorted(scalars.items()))))
    with refused(304):
        body(message(scalars=scalars))


def test_304_tensor_names() -> None:
    sent = message()
    fewer = {name: sent.tensors[name] for name in ("smashed", "labels")}
    for tensors in (fewer, {}, {**sent.tensors, "more": ramp(1)}):
        with refused(304):
            body(replace(sent, tensors=tensors))
    smaller = Payload({name: PAYLOAD.tensors[name] for name in fewer}, PAYLOAD.scalars)
    assert_refused(304, body(), smaller)
    assert_refused(304, body(replace(sent, tensors=fewer), smaller))


def test_304_tensors_repeated_or_out_of_order() -> None:
    rows = fields(body())["tensors"]
    assert_refused(304, with_fields(tensors=rows[::-1]))
    assert_refused(304, with_fields(tensors=[*rows, rows[-1]]))


def test_304_a_string_that_is_no_text() -> None:
    with refused(304):
        body(message(scalars=SCALARS | {"note": "\ud800"}))


def test_no_scalar_value_in_the_text_of_a_refusal() -> None:
    with pytest.raises(Refused) as caught:
        body(message(scalars=SCALARS | {"step": "Jane Doe"}))
    assert "Jane" not in str(caught.value)


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (1, "raw"),
        (1, "fp8"),
        (1, ""),
        (2, True),
        (3, "float16"),
        (3, "object"),
        (3, "O"),
        (3, "int64"),
        (5, 127),
    ],
)
def test_305_dtype_codec_parameter(index: int, value: object) -> None:
    assert_refused(305, with_row(index, value))


def test_305_also_when_sending() -> None:
    sent = message()
    with refused(305):
        body(replace(sent, tensors={**sent.tensors, "labels": torch.arange(5, dtype=torch.int32)}))
    wrong = Payload({**PAYLOAD.tensors, "labels": TensorSpec(torch.int64, ("batch",), "fp16")}, PAYLOAD.scalars)
    with refused(305):
        body(sent, wrong)


@pytest.mark.parametrize(
    "shape",
    [
        *([], [5], [5, 2, 4], [5, 2, 4, 4, 1], [5, 4, 2, 4], [6, 2, 4, 4]),
        *([0, 2, 4, 4], [-5, 2, 4, -4], [2**64 - 1] * 4, [5.0, 2, 4, 4], [True, 2, 4, 4], [None]),
    ],
    ids=str,
)
def test_306_shape(shape: list[Any]) -> None:
    assert_refused(306, with_row(4, shape))


@pytest.mark.parametrize("shape", [(6, 2, 4, 4), (5, 2, 4, 5), (5, 2, 4), (0, 2, 4, 4)])
def test_306_also_when_sending(shape: tuple[int, ...]) -> None:
    sent = message()
    with refused(306):
        body(replace(sent, tensors={**sent.tensors, "smashed": torch.zeros(shape)}))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_307_not_finite(value: float) -> None:
    assert_refused(307, with_fields(scalars=dict(sorted((SCALARS | {"loss": value}).items()))))
    with refused(307):
        body(message(scalars=SCALARS | {"loss": value}))
    sent = message()
    sent.tensors["smashed"][4, 1, 3, 3] = value
    with refused(307):
        body(sent)
    half = bytes(torch.tensor([value], dtype=torch.float16).view(torch.uint8).tolist())
    assert_refused(307, body()[:-2] + half)  # the last value of "smashed"


def test_308_larger_than_the_broker_takes() -> None:
    size = len(body())
    wire.encode(message(), PAYLOAD, size)
    wire.decode(body(), PAYLOAD, size)
    with refused(308):
        wire.encode(message(), PAYLOAD, size - 1)
    with refused(308):
        wire.decode(body(), PAYLOAD, size - 1)


def test_308_size_comes_before_everything_else() -> None:
    with refused(308):
        wire.decode(bytes(100), PAYLOAD, 99)


def test_308_decoded_size() -> None:
    payload = Payload({"a": TensorSpec(F32, ("n", 1000), "int8", zstd=True)})
    with refused(308):
        wire.encode(Message(HEADER, {"a": torch.zeros(100, 1000)}), payload, 49_999)
    raw = body(Message(HEADER, {"a": torch.zeros(100, 1000)}), payload)
    assert len(raw) < 2000
    wire.decode(raw, payload, 50_000)
    with refused(308):
        wire.decode(raw, payload, 49_999)
    rows = fields(raw)["tensors"]
    rows[0][4] = [2**40, 1000]
    with refused(308):
        wire.decode(with_header(raw, fields(raw) | {"tensors": rows}), payload, MIB)


def test_308_header_and_integers() -> None:
    with refused(308):
        body(message(scalars=SCALARS | {"note": "x" * wire.MAX_HEADER}))
    with refused(308):
        body(message(scalars=SCALARS | {"step": 2**63}))
    with refused(308):
        body(message(tensors={"a": torch.zeros([1] * 9)}, scalars={}), Payload({"a": TensorSpec(F32, (1,) * 9)}))
    with refused(308):
        payload = Payload({f"t{i}": TensorSpec(F32, (1,)) for i in range(wire.MAX_TENSORS + 1)})
        body(Message(HEADER, {name: ramp(1) for name in payload.tensors}), payload)


def test_309_truncated_anywhere() -> None:
    raw = body()
    for end in range(5, len(raw)):
        assert_refused(309, raw[:end])


def test_309_bytes_left_over() -> None:
    assert_refused(309, body() + b"\0")
    assert_refused(309, body() + body())
    empty = body(Message(HEADER), Payload())
    assert_refused(309, empty + b"\0" * 64, Payload())


def test_309_a_gap_that_hides_something() -> None:
    raw = bytearray(body())
    end = 4 + int.from_bytes(raw[:4], "big")
    assert end % 64
    raw[end] = 1
    assert_refused(309, bytes(raw))


@pytest.mark.parametrize("nbytes", [0, -1, -320])
def test_301_length_that_is_none(nbytes: int) -> None:
    assert_refused(301, with_row(6, nbytes))


@pytest.mark.parametrize("nbytes", [1, 319, 321, 2**62])
def test_309_length_that_is_not_that_of_the_shape(nbytes: int) -> None:
    assert_refused(309, with_row(6, nbytes))


def test_311_bomb() -> None:
    payload = Payload({"a": TensorSpec(F32, ("n",), "raw", zstd=True)})
    raw = body(Message(HEADER, {"a": torch.zeros(1000)}), payload)
    bomb = zstandard.ZstdCompressor(level=1).compress(bytes(256 * MIB))
    parsed = fields(raw)
    parsed["tensors"][0][6] = len(bomb)
    armed = with_header(raw[: -fields(raw)["tensors"][0][6]], parsed) + bomb
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    assert_refused(311, armed, payload)
    assert time.perf_counter() - started < 0.05
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10_000  # KiB


# ── golden files ────────────────────────────────────────────────────────────────────────────────

CODECS = Payload(
    {
        **{f"raw_{name}": TensorSpec(dtype, (2, 3)) for name, dtype in wire.DTYPES.items()},
        "fp32": TensorSpec(F32, ("batch", 3, 2, 2), "fp32"),
        "fp16": TensorSpec(F32, ("batch", 3, 2, 2), "fp16"),
        "bf16": TensorSpec(F32, ("batch", 3, 2, 2), "bf16"),
        "int8": TensorSpec(F32, ("batch", 3, 2, 2), "int8"),
        "none": TensorSpec(F32, ()),
    }
)
ZSTD = Payload({"int8": TensorSpec(F32, ("batch", 3, 16), "int8", zstd=True)})
EXAMPLES: dict[str, tuple[Message, Payload]] = {
    "plain": (message(), PAYLOAD),
    "empty": (Message(replace(HEADER, kind=Kind.NOTED, fence=2)), Payload()),
    "codecs": (
        Message(
            replace(HEADER, kind=Kind.CUT_GRADIENT),
            {f"raw_{name}": (ramp(2, 3) * 64).abs().to(dtype) for name, dtype in wire.DTYPES.items()}
            | {name: ramp(2, 3, 2, 2) * 1e-6 for name in ("fp32", "fp16", "bf16", "int8")}
            | {"none": torch.tensor(1.25)},
        ),
        CODECS,
    ),
    "zstd": (Message(HEADER, {"int8": ramp(2, 3, 16)}), ZSTD),
}
ZSTD_OF_GOLDEN = (1, 5, 7)  # another zstd may compress the same bytes differently


def golden(name: str) -> Path:
    return GOLDEN / f"wire_v{WIRE_VERSION}_{name}.bin"


def write_missing_golden_files() -> None:
    for name, (sent, payload) in EXAMPLES.items():
        if not golden(name).exists():
            golden(name).write_bytes(body(sent, payload))
            print("wrote", golden(name))


@pytest.mark.parametrize("name", EXAMPLES)
def test_golden_file_is_what_we_write(name: str) -> None:
    if name == "zstd" and zstandard.ZSTD_VERSION != ZSTD_OF_GOLDEN:
        pytest.skip(f"written by zstd {ZSTD_OF_GOLDEN}, this is {zstandard.ZSTD_VERSION}")
    assert body(*EXAMPLES[name]) == golden(name).read_bytes()


@pytest.mark.parametrize("name", EXAMPLES)
def test_golden_file_is_what_we_read(name: str) -> None:
    sent, payload = EXAMPLES[name]
    got = wire.decode(golden(name).read_bytes(), payload, MIB)
    assert (got.header, got.scalars) == (sent.header, sent.scalars)
    for tensor, spec in payload.tensors.items():
        if spec.codec in ("raw", "fp32"):
            assert torch.equal(got.tensors[tensor], sent.tensors[tensor])
        else:
            assert torch.allclose(got.tensors[tensor], sent.tensors[tensor], rtol=0.004, atol=1e-2)


if __name__ == "__main__":
    write_missing_golden_files()
