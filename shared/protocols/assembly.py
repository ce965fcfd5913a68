"""From run.toml to the parts of a model and the contract between them; the same at every participant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shared.config import RunConfig
from shared.contract import Payload
from shared.errors import ConfigError
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
    """
    halves = build(config.model, config.run.seed, with_head=config.run.protocol == "split_u")
    cut, head, outputs = output_shapes(halves, config.data.input_shape)
    if outputs != (config.task.outputs,):
        raise ConfigError(
            105,
            f"the model ends in shape {outputs} per sample, {config.task.kind} needs ({config.task.outputs},).",
            f"let the last layer have {config.task.outputs} output{'s' * (config.task.outputs > 1)}.",
        )
    return Assembly(halves, payloads(config, cut, head, halves.bottom, halves.top))
