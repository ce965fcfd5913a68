"""[optimizer] of run.toml, and its tables for single parts of the model."""

from typing import Annotated, Literal

from msgspec import Meta, structs

from nightsplit.shared.config.section import Natural, Section, Share

Rule = Literal["sgd", "adam", "adamw", "muon"]
Schedule = Literal["constant", "cosine"]
Part = Literal["bottom", "top", "head"]

_Above0 = Annotated[float, Meta(gt=0)]
_Decay = Annotated[float, Meta(ge=0)]


class PartSection(Section, frozen=True, kw_only=True, omit_defaults=True):
    """[optimizer.bottom], [optimizer.top], [optimizer.head]: settings of a part; None: as in [optimizer]."""

    name: Rule | None = None
    lr: _Above0 | None = None
    weight_decay: _Decay | None = None
    momentum: Share | None = None
    betas: tuple[Share, Share] | None = None
    warmup: Natural | None = None
    schedule: Schedule | None = None
    clip_norm: _Above0 | None = None


class OptimizerSection(Section, frozen=True, kw_only=True):
    """[optimizer]: update rule and learning rate. Each part of the model keeps its own state.

    Attributes:
        name: "sgd", "adam", "adamw"; "muon" for weights of two dimensions or more, with AdamW for all others.
        lr: learning rate.
        weight_decay: as in torch.
        momentum: of "sgd".
        betas: decay of Adam's and AdamW's averages of the gradient and of its square.
        warmup: steps of a part in which its learning rate rises linearly to `lr`.
        schedule: "constant", or "cosine" to zero at the end of the run, for protocols that exchange activations.
        clip_norm: L2 norm to which the gradients of a part, taken together, are clipped; None: they are not.
        bottom, top, head: settings of a part of a cut model that differ from these.
    """

    name: Rule = "adam"
    lr: _Above0 = 1e-3
    weight_decay: _Decay = 0.0
    momentum: Share = 0.0
    betas: tuple[Share, Share] = (0.9, 0.999)
    warmup: Natural = 0
    schedule: Schedule = "constant"
    clip_norm: _Above0 | None = None
    bottom: PartSection | None = None
    top: PartSection | None = None
    head: PartSection | None = None

    def of(self, part: Part) -> "OptimizerSection":
        """Return the settings of a part of the model."""
        own: PartSection | None = getattr(self, part)
        changes = {} if own is None else {key: value for key, value in structs.asdict(own).items() if value is not None}
        return structs.replace(self, **changes, bottom=None, top=None, head=None)
