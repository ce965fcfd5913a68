"""A good message of every kind of every protocol, in parts from which others can be put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, get_args

import msgpack  # type: ignore[import-untyped]
import msgspec
import torch

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.protocols import query
from nightsplit.shared.protocols.build import build_model
from nightsplit.shared.protocols.spec import PROTOCOLS, TRAINING, systems
from nightsplit.shared.wire import format as wire
from nightsplit.shared.wire.codecs import FloatCodec
from nightsplit.shared.wire.message import FROM_SITES, SERVER, UNSEQUENCED, Header, Kind, Message, Scalar
from nightsplit.shared.wire.schema import Payload, ScalarSpec, TensorSpec

LIMIT = 2**20
"""Largest message, as `wire.message_bytes` would say."""
ROWS = 3
"""Samples per batch."""
MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"settings": {"inputs": 3, "hidden": [4, 3], "outputs": 1}, "cut": 1, "head_cut": 2},
    "small_cnn": {"settings": {"outputs": 3, "width": 4}, "cut": 1, "head_cut": 4},
}


@dataclass(frozen=True)
class Specimen:
    """A good message, and what mutations need of it.

    Attributes:
        name: protocol/model/codec/kind.
        body: the bytes.
        contract: payload of each kind in its run.
    """

    name: str
    body: bytes
    contract: Mapping[Kind, Payload]

    @cached_property
    def packed(self) -> bytes:
        """The header's map."""
        return self.body[4 : 4 + int.from_bytes(self.body[:4], "big")]

    @property
    def fields(self) -> dict[str, Any]:
        """The header's map, unpacked afresh."""
        fields: dict[str, Any] = msgpack.unpackb(self.packed)
        return fields

    @cached_property
    def parts(self) -> list[bytes]:
        """The bytes of each tensor as they travel."""
        parts, end = [], 4 + len(self.packed)
        for *_, nbytes in self.fields["tensors"]:
            start = end + -end % wire.ALIGNMENT
            end = start + nbytes
            parts.append(self.body[start:end])
        return parts


def specimens() -> list[Specimen]:
    """One message per protocol, model, codec, compression and kind, and of each kind of query; equal ones once."""
    found: dict[bytes, Specimen] = {}
    runs = [(protocol, "steps") for protocol in systems(*TRAINING)]
    runs += [(protocol, "targets") for protocol in systems(*TRAINING) if PROTOCOLS[protocol].learns_by_targets]
    for (protocol, learning), model, codec, zstd in product(runs, MODELS, get_args(FloatCodec), (False, True)):
        config = _config(protocol, learning, model, codec, zstd)
        contract = build_model(config, Path()).contract
        for kind in contract:
            body = _message(config, contract[kind], kind)
            name = f"{protocol}/{model}/{codec}{'+zstd' * zstd}/{kind}"
            found.setdefault(body, Specimen(name, body, contract))
    config = _config("split_labels", "steps", "mlp", "fp32", zstd=False)
    for kind, payload in query.CONTRACT.items():
        body = _message(config, payload, kind)
        found[body] = Specimen(f"he_clstm/mlp/raw/{kind}", body, query.CONTRACT)
    return list(found.values())


def _config(protocol: str, learning: str, model: str, codec: str, zstd: bool) -> RunConfig:
    task = {"kind": "binary"} if model == "mlp" else {"kind": "multiclass", "classes": 3}
    return msgspec.convert(
        {
            "run": {
                "id": "fuzz", "protocol": protocol, "learning": learning, "sites": ["north"], "batch_size": ROWS,
                "bottoms": "averaged",
                "export_top": True,
            },
            "model": {"factory": f"nightsplit.models:{model}", **MODELS[model]},
            "task": task,
            "data": {"features": ["a", "b", "c"]} if model == "mlp" else {"image_size": 8},
            "wire": {"smashed": codec, "gradient": codec, "zstd": zstd, "message_bytes": LIMIT},
        },
        RunConfig,
    )  # fmt: skip


def _message(config: RunConfig, payload: Payload, kind: Kind) -> bytes:
    names = ("north", SERVER) if kind in FROM_SITES else (SERVER, "north")
    header = Header(config.run.id, *names, kind, seq=0 if kind in UNSEQUENCED else 7, version=3)
    generator = torch.Generator().manual_seed(1)
    texts = {"config": config.canonical(), "contract": config.digest, "metrics": '{"test": {"auc": 0.75}}'}
    plain: dict[type, Scalar] = {bool: True, int: 12, float: 0.5}
    message = Message(
        header,
        {name: _tensor(spec, generator) for name, spec in payload.tensors.items()},
        {
            name: texts.get(name, "Grüße") if spec.type is str else _number(spec, plain)
            for name, spec in payload.scalars.items()
        },
    )
    return b"".join(wire.encode(message, payload, LIMIT))


def _number(spec: ScalarSpec, plain: Mapping[type, Scalar]) -> Scalar:
    value = plain[spec.type]
    return value if isinstance(value, bool | str) else type(value)(max(value, spec.low))


def _tensor(spec: TensorSpec, generator: torch.Generator) -> torch.Tensor:
    shape = tuple(ROWS if isinstance(length, str) else length for length in spec.shape)
    if spec.dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(spec.dtype)
    return torch.randint(0, 2, shape, generator=generator).to(spec.dtype)


MARK = "\x01\x02\x03here\x03\x02\x01"
"""Stands in a header where a fragment goes."""


def rebuilt(fields: Any, parts: list[bytes], fragment: bytes = b"") -> bytes:
    """A body of this header and these tensor bytes, with gaps as they should be."""
    try:
        packed = msgpack.packb(fields, unicode_errors="surrogatepass")
    except (OverflowError, ValueError):  # beyond 64 bits, or nested deeper than msgpack packs
        packed = b"\xcf" + bytes(8)
    body = bytearray(4) + packed.replace(msgpack.packb(MARK), fragment)
    body[:4] = (len(body) - 4).to_bytes(4, "big")
    for part in parts:
        body += bytes(-len(body) % wire.ALIGNMENT) + part
    return bytes(body)
