"""A good message on the wire, and the same with one thing altered."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgpack
import pytest
import torch

from nightsplit.shared.errors import Refused
from nightsplit.shared.wire import format as wire
from nightsplit.shared.wire.message import Header, Kind, Message, Scalar
from nightsplit.shared.wire.schema import Payload, Reveals, ScalarSpec, ScalarType, TensorSpec

MIB = 2**20
F32 = torch.float32
HEADER = Header("night-7", "st-mary", "server", Kind.SMASHED, seq=12, reply_to=3, version=9)
TYPES: dict[str, ScalarType] = {"loss": float, "step": int, "last": bool, "note": str}
PAYLOAD = Payload(
    Kind.SMASHED,
    {
        "smashed": TensorSpec(F32, ("batch", 2, 4, 4), "fp16", reveals=Reveals.ACTIVATIONS),
        "labels": TensorSpec(torch.int64, ("batch",), reveals=Reveals.LABELS),
        "mask": TensorSpec(torch.bool, ("batch", "classes"), reveals=Reveals.LABELS),
    },
    {name: ScalarSpec(of, Reveals.COUNTS) for name, of in TYPES.items()},
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
