"""Published model file: the weights of a network, and a card that states their origin.

    model.safetensors   one tensor per weight, by the names of the model's state dict
                        metadata "card": JSON, see `Card`

One file, so that weights and card stay together. A run names it by its SHA-256, as `sha256sum` prints it, and
refuses any other file.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from msgspec import Struct
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from nightsplit.shared.errors import ConfigError
from nightsplit.shared.models.hashing import weights_sha256
from nightsplit.shared.storage.files import write_atomic

_CARD = "card"


class SourceCard(Struct, frozen=True, kw_only=True):
    """Data set that a model was trained on.

    Attributes:
        name: its name.
        licence: as its publisher states it; None if unknown.
        classes: labels in the order of the model's outputs.
        samples: number of training samples.
        held_out: number of held-out samples.
        figures: on held-out samples, see `nightsplit.shared.learning.metrics.measure`.
    """

    name: str
    licence: str | None
    classes: list[str]
    samples: int
    held_out: int
    figures: dict[str, float | None]


class Card(Struct, frozen=True, kw_only=True):
    """Origin of a published model.

    Attributes:
        name: name of the model.
        factory, settings: [model] of the configuration that made it.
        head: name of the module made for the source's task, which another task does not take over.
        input_shape: shape of one sample, without the batch dimension.
        sources: data sets that it was trained on.
        epochs: passes over the sources.
        seed: seed of weights, order and augmentation.
        date: day on which it was written, UTC, as 2026-01-31.
        weights_sha256: hash of the weights alone, see `hashing`; equal for equal trainings.
    """

    name: str
    factory: str
    settings: dict[str, Any]
    head: str
    input_shape: list[int]
    sources: list[SourceCard]
    epochs: int
    seed: int
    date: str
    weights_sha256: str


@dataclass(frozen=True, eq=False)
class Artifact:
    """Verified content of a published model file: hash of the whole file, card, and weights by name on the CPU."""

    path: Path
    sha256: str
    card: Card
    tensors: Mapping[str, torch.Tensor]

    def load_into(self, module: nn.Module) -> None:
        """Load these weights into a model, except those of its head.

        Every weight outside the head must be in both with the same shape and dtype: a partly loaded
        backbone would be a different network.

        Raises:
            ConfigError: 117 the two differ outside the head; the model is unchanged.
        """
        own = module.state_dict()
        head = f"{self.card.head}."
        backbone = {name for name in own if not name.startswith(head)}
        published = {name for name in self.tensors if not name.startswith(head)}
        for name in sorted(backbone ^ published):
            missing = "the model" if name in published else "the file"
            raise self._misfit(f"{missing} has no {name}")
        for name in sorted(backbone):
            theirs, mine = self.tensors[name], own[name]
            if (theirs.shape, theirs.dtype) != (mine.shape, mine.dtype):
                raise self._misfit(f"{name} is {_describe(theirs)} in the file and {_describe(mine)} in the model")
        module.load_state_dict({name: self.tensors[name] for name in backbone}, strict=False)

    def _misfit(self, difference: str) -> ConfigError:
        made = f"{self.card.factory} with {self.card.settings}"
        remedy = f"build the model as the file's was: {made}; only {self.card.head} may differ."
        return ConfigError(117, f"{self.path}: {difference}.", remedy)


def write_artifact(path: Path, card: Card, tensors: Mapping[str, torch.Tensor]) -> str:
    """Write a model file atomically and return its SHA-256; OSError if it cannot be written.

    `card.weights_sha256` is `weights_sha256(tensors)`.
    """
    metadata = {_CARD: msgspec.json.encode(card, order="sorted").decode()}
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content)
    return hashlib.sha256(content).hexdigest()


def read_artifact(path: Path, sha256: str | None = None) -> Artifact:
    """Read a published model, of this hash if one is given; ConfigError 115 no intact model file, 116 another hash."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _unusable(path, error.strerror or "cannot be read") from None
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and found != sha256.lower():
        sentence = f"{path} has sha256 {found[:12]}..., {sha256[:12]}... is expected."
        remedy = "ask its publisher for that file, or correct the hash if this is the model you mean."
        raise ConfigError(116, sentence, remedy)
    try:
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])  # as in any safetensors file
        card = msgspec.json.decode(header["__metadata__"][_CARD], type=Card)
    except SafetensorError:
        raise _unusable(path, "is not a safetensors file, or is damaged") from None
    except (KeyError, msgspec.DecodeError):
        raise _unusable(path, "holds weights without a card that states their origin") from None
    if weights_sha256(tensors) != card.weights_sha256:
        raise _unusable(path, "holds other weights than its card states")
    return Artifact(path, found, card, tensors)


def _unusable(path: Path, reason: str) -> ConfigError:
    return ConfigError(115, f"{path}: {reason}.", "create it with nightsplit pretrain, or download it again.")


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
