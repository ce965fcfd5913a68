"""Construction of a run's modules and contract from run.toml, the same at every participant."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.errors import BrokerError, ConfigError
from nightsplit.shared.learning.seeds import Seed
from nightsplit.shared.models.layout import WeightLayout, build_network
from nightsplit.shared.models.partition import ModelParts, build, flow_shapes
from nightsplit.shared.protocols.rounds import HEADER_BYTES, slice_length
from nightsplit.shared.protocols.spec import Shape, Shapes, spec_of
from nightsplit.shared.protocols.stream import weights
from nightsplit.shared.wire.codecs import encoded_size
from nightsplit.shared.wire.message import Kind
from nightsplit.shared.wire.schema import BATCH, Payload


@dataclass(frozen=True)
class SplitModel:
    """Model in parts, freshly initialised and equal at every participant, for protocols that exchange activations."""

    parts: ModelParts
    contract: Mapping[Kind, Payload]

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """Modules by name, in the order of the forward pass."""
        return self.parts.modules


@dataclass(frozen=True)
class WholeModel:
    """Whole model with its initial weights, equal at every participant, and the layout of the weights that are sent."""

    module: nn.Module
    layout: WeightLayout
    contract: Mapping[Kind, Payload]

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The model under its name."""
        return {"model": self.module}


def build_split_model(config: RunConfig, base: Path, seed: Seed | None = None) -> SplitModel:
    """Build the model, cut it, and derive the contract.

    Args:
        base: folder of run.toml.
        seed: of the first weights; None for the run's public seed.

    Raises:
        ConfigError: 101, 103-105, 119 as in `build`; 105 the last layer does not fit the task.
        BrokerError: 203 a planned message exceeds wire.message_bytes.
    """
    spec = spec_of(config)
    parts = build(config.model, config.run.seed if seed is None else seed, base, with_head=spec.has_head)
    shapes = flow_shapes(parts.modules, config.data.input_shape)
    _check_outputs(config, shapes["head" if spec.has_head else "top"])
    head = shapes["top"] if spec.has_head else ()
    contract = spec.payloads(config, Shapes(shapes["bottom"], head, weights(parts.bottom), weights(parts.top)))
    planned = planned_message_bytes(config, contract)
    if planned > config.content_bytes:
        needed, allowed = planned / 2**20, config.content_bytes / 2**20
        sentence = f"a message of this run needs {needed:.1f} MiB, wire.message_bytes allows {allowed:.1f} MiB."
        remedy = "lower run.batch_size, choose a smaller codec, switch run.export_top off, or raise wire.message_bytes "
        raise BrokerError(203, sentence, remedy + "and the broker's own limit.")
    return SplitModel(parts, contract)


def build_whole_model(config: RunConfig, base: Path) -> WholeModel:
    """Build the uncut model of a run of rounds, and derive the contract; `base` is the folder of run.toml.

    Raises:
        ConfigError: 101, 103, 104, 119 the factory cannot be used, 105 the last layer does not fit the task or
            nothing is trained, 115-117 the initial weights cannot be used.
        BrokerError: 203 wire.message_bytes is too small for weights.
    """
    if config.wire.message_bytes < 2 * HEADER_BYTES:
        sentence = f"wire.message_bytes is {config.wire.message_bytes}; a message of weights needs {2 * HEADER_BYTES}."
        raise BrokerError(203, sentence, "raise wire.message_bytes; larger messages mean fewer of them.")
    module = build_network(config, base)
    _check_outputs(config, flow_shapes({"model": module}, config.data.input_shape)["model"])
    layout = WeightLayout.of(module, config, slice_length=slice_length(config))
    shapes = Shapes(statistics=int(layout.statistics.sum()))
    return WholeModel(module, layout, spec_of(config).payloads(config, shapes))


def build_model(config: RunConfig, base: Path, seed: Seed | None = None) -> SplitModel | WholeModel:
    """Build the model that the run's protocol needs; arguments and errors as above.

    A whole model has public first weights, since the sites' updates are combined.
    """
    if spec_of(config).shape is Shape.ROUND:
        return build_whole_model(config, base)
    return build_split_model(config, base, seed)


def planned_message_bytes(config: RunConfig, contract: Mapping[Kind, Payload]) -> int:
    """Return the size of a run's largest message in bytes, without compression and header."""
    lengths = {BATCH: 2 * config.run.batch_size - 1, "slice": slice_length(config)}  # an only batch takes the remainder

    def size(payload: Payload) -> int:
        return sum(
            encoded_size(spec.codec, spec.dtype, tuple(lengths[n] if isinstance(n, str) else n for n in spec.shape))
            for spec in payload.tensors.values()
        )

    return max(map(size, contract.values()), default=0)


def _check_outputs(config: RunConfig, found: tuple[int, ...]) -> None:
    expected = config.output_shape
    if found != expected:
        sentence = f"the model ends in shape {found} per sample, {config.task.kind} needs {expected}."
        width = f"{expected[0]} output{'s' * (expected[0] > 1)}{' for each pixel' if len(expected) > 1 else ''}"
        raise ConfigError(105, sentence, f"give the last layer {width}.")
