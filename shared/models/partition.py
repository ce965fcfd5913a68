"""Partition of the user's model: bottom for the site, top for the server, head for a U-shape.

                    cut                        head_cut (split_u only)
    stages  0 .. cut-1 | cut .. head_cut-1 | head_cut .. end
            bottom     | top               | head
            site       | server            | site again

Every invalid cut is found here, before a patient's data is read, and the error names the nearest
valid cut (as in torchgpipe's `split_module`).
"""

import copy
import itertools
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nightsplit.shared.config.run import ModelSection
from nightsplit.shared.errors import ConfigError
from nightsplit.shared.learning.seeds import Seed
from nightsplit.shared.models.factory import describe, make

Shape = tuple[int, ...]

# Effect of a part without weights.
_WEIGHTLESS = {
    "bottom": "the site would send its data as they are",
    "top": "the server would have nothing to train",
    "head": "the site would have nothing to train on its labels",
}


@dataclass(frozen=True)
class ModelParts:
    """Model in parts; the whole is `head(top(bottom(x)))`, or `top(bottom(x))` without a head.

    Attributes:
        bottom: from the data to the cut; at the site.
        top: from the cut to the output, or to the head's input; at the server.
        head: from the top's output to the prediction, at the site; None unless the run is a split_u.
    """

    bottom: nn.Module
    top: nn.Module
    head: nn.Module | None = None

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Parts by name, in the order of the forward pass."""
        modules = {"bottom": self.bottom, "top": self.top}
        return modules if self.head is None else {**modules, "head": self.head}


def build(model: ModelSection, seed: Seed, folder: Path, *, with_head: bool) -> ModelParts:
    """Build the model of a run and cut it.

    Every participant builds the whole model and keeps its part: the factory runs with torch's CPU
    generator at a seed that depends only on `seed`, so that all start from the same weights. A factory
    that draws from another generator (numpy, random) must seed it itself.

    Args:
        model: the factory, its settings and the cut. The parts of an `nn.Sequential` keep the names of its
            stages, so their state dicts together are the whole model's.
        seed: the run's seed.
        folder: folder of run.toml.
        with_head: whether the model has a head (split_u); otherwise `model.head_cut` is ignored.

    Raises:
        ConfigError: 101, 103, 104, 119 as `make`; 104 the factory returns neither a plain
            `nn.Sequential` nor `ModelParts`; 105 the model cannot be cut there: a part is empty or holds no
            weights, two parts share weights, or the head is missing.
    """
    whole = make(model, seed, folder)
    if isinstance(whole, ModelParts):
        return _check_parts(model, whole, with_head=with_head)
    # A subclass with its own forward is not a chain of stages: a cut would change its output.
    if isinstance(whole, nn.Sequential) and type(whole).forward is nn.Sequential.forward:
        return _cut(model, whole, with_head=with_head)
    sentence = f"{model.factory} returned {type(whole).__name__}, neither a plain nn.Sequential nor ModelParts."
    remedy = "return nn.Sequential(...) of its stages, or nightsplit.models.ModelParts(bottom=..., top=...)."
    raise ConfigError(104, sentence, remedy)


def flow_shapes(parts: Mapping[str, nn.Module], input_shape: Shape) -> dict[str, Shape]:
    """Return the output shape of each part of a chain for a float32 sample of `input_shape`.

    All shapes lack the batch dimension. They come from a forward pass of zeros through a copy in eval
    mode: weights, buffers, modes and generators of the model stay unchanged.

    Raises:
        ConfigError: 104 a part does not accept the output before it; 105 a part does not return one
            tensor with a row per sample, which could be sent.
    """
    shapes: dict[str, Shape] = {}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        flow = torch.zeros(2, *input_shape)  # two samples, to see whether the batch dimension is kept
        for name, part in parts.items():
            received = tuple(flow.shape[1:])
            try:
                flow = copy.deepcopy(part).cpu().eval()(flow)
            except Exception as error:
                sentence = f"the {name} does not take a sample of shape {received}: {describe(error)}."
                remedy = "make model.settings fit the data: its features, or its channels and image size."
                raise ConfigError(104, sentence, remedy) from error
            if not isinstance(flow, Tensor) or flow.ndim == 0 or flow.shape[0] != 2:
                returned = f"shape {tuple(flow.shape)}" if isinstance(flow, Tensor) else type(flow).__name__
                sentence = f"for 2 samples the {name} returns {returned}, not a tensor with 2 rows."
                remedy = "cut where the model passes on one tensor whose first dimension is the batch."
                raise ConfigError(105, sentence, remedy)
            shapes[name] = tuple(flow.shape[1:])
    return shapes


def _cut(model: ModelSection, whole: nn.Sequential, *, with_head: bool) -> ModelParts:
    # Not named_children(), which skips a stage that occurs twice.
    stages = list(whole._modules.items())

    def parts(*cuts: int) -> dict[str, nn.Module]:
        bounds = itertools.pairwise((0, *cuts, len(stages)))
        cut = (nn.Sequential(OrderedDict(stages[first:last])) for first, last in bounds)
        return dict(zip(("bottom", "top", "head"), cut, strict=False))

    settings = {"model.cut": model.cut}
    if with_head:
        settings["model.head_cut"] = model.head_cut or len(stages)
    unset = with_head and model.head_cut is None
    problem = "the run needs a head and that is not set" if unset else _problem(parts(*settings.values()))
    if problem is None:
        return ModelParts(**parts(*settings.values()))

    possible = itertools.combinations(range(1, len(stages)), len(settings))
    cuts = [cuts for cuts in possible if _problem(parts(*cuts)) is None]
    remedy = "give every part a stage with weights that no other part uses."
    if cuts:
        nearest = min(cuts, key=lambda cuts: math.dist(cuts, settings.values()))
        valid = " and ".join(f"{key} = {value}" for key, value in zip(settings, nearest, strict=True))
        remedy = f"set {valid}: {_format_stages(stages, nearest)}."
    invalid = ", ".join(f"{key} = {value}" for key, value in settings.items())
    raise ConfigError(105, f"{model.factory} with {invalid}: {problem}.", remedy)


def _format_stages(stages: Sequence[tuple[str, nn.Module]], cuts: tuple[int, ...]) -> str:
    """Return the stages with their index and a bar at every cut: '0 conv, 1 relu | 2 linear'."""
    text = ""
    for index, (name, stage) in enumerate(stages):
        text += " | " if index in cuts else ", " if index else ""
        text += f"{index} {type(stage).__name__ if name.isdigit() else name}"
    return text


def _check_parts(model: ModelSection, parts: ModelParts, *, with_head: bool) -> ModelParts:
    """Return the parts that a factory cut itself, if the run can use them."""
    modules: Mapping[str, object] = parts.modules
    for name, part in modules.items():
        if not isinstance(part, nn.Module):
            sentence = f"{model.factory} returned ModelParts whose {name} is of type {type(part).__name__}."
            raise ConfigError(104, sentence, "make every part an nn.Module.")
    problem = _problem(parts.modules)
    if with_head and parts.head is None:
        problem = "the run needs a head, but the ModelParts have none"
    elif parts.head is not None and not with_head:
        problem = "the ModelParts have a head, but only split_u uses one"
    if problem is None:
        return parts
    expected = "ModelParts(bottom=..., top=..., head=...)" if with_head else "ModelParts(bottom=..., top=...)"
    remedy = f"return {expected}, each part with weights that no other part uses."
    raise ConfigError(105, f"{model.factory}: {problem}.", remedy)


def _problem(parts: Mapping[str, nn.Module]) -> str | None:
    """Return the reason why these parts cannot be trained separately; None if they can."""
    owners: dict[int, tuple[str, str]] = {}
    for part, module in parts.items():
        if isinstance(module, nn.Sequential) and not len(module):
            return f"nothing is left for the {part}"
        if next(module.parameters(), None) is None:
            return f"the {part} has no weights, so {_WEIGHTLESS[part]}"
        for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
            if is_lazy(tensor):
                return f"{name} of the {part} is lazy: it would start differently at every participant"
            # By storage, since a view of another part's weights is shared, too; an empty tensor has no storage (0).
            storage = tensor.untyped_storage().data_ptr()
            owner, first = owners.setdefault(storage, (part, name)) if storage else (part, name)
            if owner != part:
                return f"{owner} and {part} share weights ({first} and {name})"
    return None
