"""A published model file: the weights of a network, and a card that says what they learned from.

    model.safetensors   one tensor per weight, by the names of the model's state dict
                        metadata "card": JSON, see `Card`

One file, so that weights and card cannot be parted. Its name in a run is its sha256, the one that `sha256sum`
prints: whoever begins from it states the hash, and anything else is refused.
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
    """A data set that a model learned from.

    Attributes:
        name: what it is called.
        licence: as its publisher states it; None where that is not known.
        classes: labels in the order of the model's outputs.
        samples: number of samples that were trained on.
        held_out: number of samples that the figures were measured on.
        figures: on held-out samples, as `nightsplit.shared.learning.metrics.measure` gives them.
    """

    name: str
    licence: str | None
    classes: list[str]
    samples: int
    held_out: int
    figures: dict[str, float | None]


class Card(Struct, frozen=True, kw_only=True):
    """Where a published model comes from.

    Attributes:
        name: of the model.
        factory, settings: [model] of the configuration that made it.
        head: the module that was made for the source's task; it is not taken over by another task.
        input_shape: of one sample, without the batch dimension.
        sources: what it learned from.
        epochs: passes over the sources.
        seed: of weights, order and augmentation.
        date: day on which it was written, UTC, as 2026-01-31.
        weights_sha256: of the weights alone, see `hashing`; two trainings that agree agree in it.
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
    """A published model file, as read and verified.

    Attributes:
        path: the file.
        sha256: of the whole file.
        card: where the weights come from.
        tensors: the weights by name, on the CPU.
    """

    path: Path
    sha256: str
    card: Card
    tensors: Mapping[str, torch.Tensor]

    def load_into(self, module: nn.Module) -> None:
        """Let a model begin with these weights; its own head stays as it was made.

        Every weight outside the head must be in both with the same shape and dtype: a backbone that is
        taken in part would be another network than either.

        Raises:
            ConfigError: 117 the two differ outside the head; the model is unchanged.
        """
        own = module.state_dict()
        head = f"{self.card.head}."
        wanted = {name for name in own if not name.startswith(head)}
        published = {name for name in self.tensors if not name.startswith(head)}
        for name in sorted(wanted ^ published):
            missing = "the model" if name in published else "the file"
            raise self._misfit(f"{missing} has no {name}")
        for name in sorted(wanted):
            theirs, mine = self.tensors[name], own[name]
            if (theirs.shape, theirs.dtype) != (mine.shape, mine.dtype):
                raise self._misfit(f"{name} is {_described(theirs)} in the file and {_described(mine)} in the model")
        module.load_state_dict({name: self.tensors[name] for name in wanted}, strict=False)

    def _misfit(self, what: str) -> ConfigError:
        return ConfigError(
            117,
            f"{self.path}: {what}.",
            f"build the model as the file's was: {self.card.factory} with {self.card.settings}; only {self.card.head} "
            "may differ.",
        )


def write_artifact(path: Path, card: Card, tensors: Mapping[str, torch.Tensor]) -> str:
    """Publish a model, whole or not at all, and return the sha256 of its file; OSError: it cannot be written.

    Args:
        path: the file.
        card: its `weights_sha256` is `weights_sha256(tensors)`.
        tensors: the weights by name.
    """
    metadata = {_CARD: msgspec.json.encode(card, order="sorted").decode()}
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content)
    return hashlib.sha256(content).hexdigest()


def read_artifact(path: Path, sha256: str | None = None) -> Artifact:
    """Read a published model, whose file has this sha256, or any for None.

    Raises:
        ConfigError: 115 it is missing, damaged, or no such file; 116 it is another one than expected.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _unusable(path, error.strerror or "cannot be read") from None
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and found != sha256.lower():
        what = f"{path} has sha256 {found[:12]}..., {sha256[:12]}... is expected."
        remedy = "ask its publisher for that file, or correct the hash if this is the model you mean."
        raise ConfigError(116, what, remedy)
    try:
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])  # that of any safetensors file
        card = msgspec.json.decode(header["__metadata__"][_CARD], type=Card)
    except SafetensorError:
        raise _unusable(path, "is no safetensors file, or is damaged") from None
    except (KeyError, msgspec.DecodeError):
        raise _unusable(path, "holds weights without a card that says where they come from") from None
    if weights_sha256(tensors) != card.weights_sha256:
        raise _unusable(path, "holds other weights than its card says")
    return Artifact(path, found, card, tensors)


def _unusable(path: Path, what: str) -> ConfigError:
    return ConfigError(115, f"{path}: {what}.", "make it with nightsplit pretrain, or fetch it again.")


def _described(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
