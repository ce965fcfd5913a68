"""From run.toml to the parts of a model and the contract between them; the same at every participant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from shared.config import RunConfig
from shared.contract import Payload
from shared.errors import BrokerError, ConfigError
from shared.message import Kind
from shared.models.cutting import Halves, build, output_shapes
from shared.protocols.stream import payloads


@dataclass(frozen=True)
class Assembly:
    """What a run is made of.

    Attributes:
        halves: freshly initialised modules, equal at every participant.
        contract: payload of each kind of message.
    """

    halves: Halves
    contract: Mapping[Kind, Payload]


def assemble(config: RunConfig) -> Assembly:
    """Build the model, cut it, and derive the contract.

    Raises:
        ConfigError: 104, 105 as `build`; 105 when the last layer does not fit the task.
        BrokerError: 203 a planned message exceeds wire.message_bytes.
    """
    halves = build(config.model, config.run.seed, with_head=config.run.protocol == "split_u")
    cut, head, outputs = output_shapes(halves, config.data.input_shape)
    if outputs != (config.task.outputs,):
        raise ConfigError(
            105,
            f"the model ends in shape {outputs} per sample, {config.task.kind} needs ({config.task.outputs},).",
            f"let the last layer have {config.task.outputs} output{'s' * (config.task.outputs > 1)}.",
        )
    contract = payloads(config, cut, head, halves.bottom, halves.top)
    planned = planned_message_bytes(config, contract)
    if planned > config.wire.message_bytes:
        raise BrokerError(
            203,
            f"a message of this run needs {planned / 2**20:.1f} MiB, wire.message_bytes allows "
            f"{config.wire.message_bytes / 2**20:.1f} MiB.",
            "lower run.batch_size, choose a smaller codec, switch run.export_top off, or raise wire.message_bytes "
            "and the broker's own limit.",
        )
    return Assembly(halves, contract)


def planned_message_bytes(config: RunConfig, contract: Mapping[Kind, Payload]) -> int:
    """Size of the largest message of a run, without compression and header."""
    widths = {"raw": None, "fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}

    def size(payload: Payload) -> int:
        return sum(
            prod(config.run.batch_size if isinstance(n, str) else n for n in spec.shape)
            * (widths[spec.codec] or spec.dtype.itemsize)
            for spec in payload.tensors.values()
        )

    return max(size(payload) for payload in contract.values())
