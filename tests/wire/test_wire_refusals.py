"""What is refused on the wire, number by number."""

from __future__ import annotations

import pickle
import resource
import tracemalloc
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import msgpack
import pytest
import torch
import zstandard

from nightsplit.shared.errors import Refused
from nightsplit.shared.wire import format as wire
from nightsplit.shared.wire import head
from nightsplit.shared.wire.message import Kind, Message, Scalar
from nightsplit.shared.wire.schema import Payload, TensorSpec
from tests.harness.wire_bodies import (
    F32,
    HEADER,
    MIB,
    PAYLOAD,
    SCALARS,
    assert_refused,
    body,
    fields,
    message,
    ramp,
    refused,
    with_fields,
    with_header,
    with_row,
)


class Evil:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("a pickle was loaded",))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("content", [Evil(), {"wire": 1}, ramp(5)], ids=["evil", "map", "tensor"])
def test_301_pickle(content: object, protocol: int) -> None:
    raw = pickle.dumps(content, protocol)
    assert_refused(301, raw)
    with refused(301):
        head.read_head(raw)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\0\0\0\0",
        b"\0\0\0\0\0",
        b"{}",
        b"GET / HTTP/1.1\r\n\r\n",
        (head.MAX_HEADER + 1).to_bytes(4, "big") + bytes(head.MAX_HEADER + 1),
    ],
)
def test_301_not_ours(raw: bytes) -> None:
    assert_refused(301, raw)


def nested(depth: int) -> bytes:
    return (b"\xdd" + head.MAX_TENSORS.to_bytes(4, "big")) * depth


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
    assert_refused(301, with_header(b"\0\0\0\0", packed))


@pytest.mark.parametrize("claim", [head.MAX_TENSORS + 1, 200_000])
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
    smaller = Payload(Kind.SMASHED, {name: PAYLOAD.tensors[name] for name in fewer}, PAYLOAD.scalars)
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
    wrong = Payload(
        Kind.CUT_GRADIENT, {**PAYLOAD.tensors, "labels": TensorSpec(torch.int64, ("batch",), "fp16")}, PAYLOAD.scalars
    )
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


def test_308_size_comes_before_the_content() -> None:
    raw = with_header(body(), fields(body()) | {"scalars": {}})
    assert_refused(304, raw)
    with refused(308):
        wire.decode(raw, PAYLOAD, len(raw) - 1)


def test_308_decoded_size() -> None:
    payload = Payload(Kind.NOTED, {"a": TensorSpec(F32, ("n", 1000), "int8", zstd=True)})
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
        body(message(scalars=SCALARS | {"note": "x" * head.MAX_HEADER}))
    with refused(308):
        body(message(scalars=SCALARS | {"step": 2**63}))
    with refused(308):
        body(
            message(tensors={"a": torch.zeros([1] * 9)}, scalars={}),
            Payload(Kind.NOTED, {"a": TensorSpec(F32, (1,) * 9)}),
        )
    with refused(308):
        payload = Payload(Kind.NOTED, {f"t{i}": TensorSpec(F32, (1,)) for i in range(head.MAX_TENSORS + 1)})
        body(Message(HEADER, {name: ramp(1) for name in payload.tensors}), payload)


def test_309_truncated_anywhere() -> None:
    raw = body()
    for end in range(5, len(raw)):
        assert_refused(309, raw[:end])


def test_309_bytes_left_over() -> None:
    assert_refused(309, body() + b"\0")
    assert_refused(309, body() + body())
    empty = body(Message(HEADER), Payload(Kind.NOTED))
    assert_refused(309, empty + b"\0" * 64, Payload(Kind.NOTED))


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
    payload = Payload(Kind.NOTED, {"a": TensorSpec(F32, ("n",), "raw", zstd=True)})
    raw = body(Message(HEADER, {"a": torch.zeros(1000)}), payload)
    bomb = zstandard.ZstdCompressor(level=1).compress(bytes(256 * MIB))
    parsed = fields(raw)
    parsed["tensors"][0][6] = len(bomb)
    armed = with_header(raw[: -fields(raw)["tensors"][0][6]], parsed) + bomb
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert_refused(311, armed, payload)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10_000  # KiB
