"""The wire format: round trip, layout, golden files.

`python -m tests.wire.test_wire` writes the golden files of the present `WIRE_VERSION` that do not
exist yet. Files of a published version are never written again: a new layout is a new version,
and its files stand beside the old ones.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard

from nightsplit.shared.wire import codecs, head
from nightsplit.shared.wire import format as wire
from nightsplit.shared.wire.message import WIRE_VERSION, Kind, Message
from nightsplit.shared.wire.schema import Payload, TensorSpec
from tests.harness.wire_bodies import F32, HEADER, MIB, PAYLOAD, TYPES, body, fields, message, ramp, with_header

GOLDEN = Path(__file__).parents[1] / "golden"


def test_round_trip() -> None:
    sent = message()
    got = wire.decode(body(), PAYLOAD, MIB)
    assert got.header == sent.header
    assert head.read_head(body()).header == sent.header
    assert got.scalars == sent.scalars
    assert {name: type(value) for name, value in got.scalars.items()} == TYPES
    assert got.tensors.keys() == sent.tensors.keys()
    assert all(torch.equal(got.tensors[name], sent.tensors[name]) for name in sent.tensors)


@pytest.mark.parametrize("kind", list(Kind))
def test_every_kind_and_nothing_inside(kind: Kind) -> None:
    raw = body(Message(replace(HEADER, kind=kind)), Payload(kind))
    assert head.read_head(raw).header == wire.decode(raw, Payload(kind), MIB).header == replace(HEADER, kind=kind)
    assert type(head.read_head(raw).header.kind) is Kind


def test_equal_messages_give_equal_bytes_in_any_order() -> None:
    sent = message()
    backwards = replace(
        sent,
        tensors=dict(reversed(sent.tensors.items())),
        scalars=dict(reversed(sent.scalars.items())),
    )
    other = Payload(Kind.SMASHED, dict(reversed(PAYLOAD.tensors.items())), dict(reversed(PAYLOAD.scalars.items())))
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
    payload = Payload(Kind.NOTED, {"a": TensorSpec(F32, ("n", 8), codec), "b": TensorSpec(torch.int64, (3,))})
    raw = body(Message(HEADER, {"a": ramp(1000, 8), "b": torch.arange(3)}), payload)
    start = torch.frombuffer(raw, dtype=torch.uint8).data_ptr()
    for tensor in wire.decode(raw, payload, MIB).tensors.values():
        offset = tensor.data_ptr() - start
        assert offset % 64 == 0
        assert 0 < offset <= len(raw) - tensor.nbytes


def test_encoding_hands_out_the_tensors_own_memory() -> None:
    tensor = ramp(1000)
    pieces = wire.encode(Message(HEADER, {"a": tensor}), Payload(Kind.NOTED, {"a": TensorSpec(F32, (1000,))}), MIB)
    assert isinstance(pieces[-1], memoryview)
    assert torch.frombuffer(pieces[-1], dtype=F32).data_ptr() == tensor.data_ptr()


def test_hundreds_of_tensors_fit() -> None:
    payload = Payload(Kind.NOTED, {f"layer{i}.block.conv.weight": TensorSpec(F32, (2, 2)) for i in range(2000)})
    sent = Message(HEADER, {name: ramp(2, 2) for name in payload.tensors})
    assert len(wire.decode(body(sent, payload), payload, MIB).tensors) == 2000


# ── golden files ────────────────────────────────────────────────────────────────────────────────

CODECS = Payload(
    Kind.CUT_GRADIENT,
    {
        **{f"raw_{name}": TensorSpec(dtype, (2, 3)) for name, dtype in codecs.DTYPES.items()},
        "fp32": TensorSpec(F32, ("batch", 3, 2, 2), "fp32"),
        "fp16": TensorSpec(F32, ("batch", 3, 2, 2), "fp16"),
        "bf16": TensorSpec(F32, ("batch", 3, 2, 2), "bf16"),
        "int8": TensorSpec(F32, ("batch", 3, 2, 2), "int8"),
        "none": TensorSpec(F32, ()),
    },
)
ZSTD = Payload(Kind.NOTED, {"int8": TensorSpec(F32, ("batch", 3, 16), "int8", zstd=True)})
EXAMPLES: dict[str, tuple[Message, Payload]] = {
    "plain": (message(), PAYLOAD),
    "empty": (Message(replace(HEADER, kind=Kind.NOTED, fence=2)), Payload(Kind.NOTED)),
    "codecs": (
        Message(
            replace(HEADER, kind=Kind.CUT_GRADIENT),
            {f"raw_{name}": (ramp(2, 3) * 64).abs().to(dtype) for name, dtype in codecs.DTYPES.items()}
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
