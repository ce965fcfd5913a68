"""Parts of the model that a run trains: which optimizers suit them, and how late their gradients come."""

from typing import get_args

from nightsplit.shared.config.optimizer import OptimizerSection, Part, PartSection
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.config.section import KeyConflictError
from nightsplit.shared.protocols.spec import Shape, spec_of

_RULES_WITH = {"momentum": {"sgd"}, "betas": {"adam", "adamw", "muon"}}
"""Update rules that a key belongs to; all other keys belong to every rule."""


def trained_parts(config: RunConfig) -> list[Part]:
    """Return the parts that have an optimizer of their own; none in rounds, which train a whole model."""
    spec = spec_of(config)
    if spec.shape is Shape.ROUND:
        return []
    trained: dict[Part, bool] = {"bottom": spec.trains_bottom, "top": True, "head": spec.has_head}
    return [part for part, is_trained in trained.items() if is_trained]


def steps_late(config: RunConfig) -> dict[Part, int]:
    """Return the number of steps that each part takes between a forward pass and the step with its gradient.

    In a run that learns by targets there are no such gradients, and the numbers are 0. Otherwise they hold for full
    windows and sites of equal size. With a head, the gradient of an item returns half a window of the site's items
    later, and the top takes a step for every site's item: so for a site with share s of the items it is window / 2 / s.
    """
    window = 1 if config.run.learning == "targets" else config.run.window
    late: dict[Part, int] = {"bottom": window - 1, "top": 0, "head": 0}
    if spec_of(config).has_head:
        late["top"] = window // 2 * len(config.run.sites)
    return {part: late[part] for part in trained_parts(config)}


def suits_late(section: OptimizerSection) -> bool:
    """Return whether the settings of a part suit late gradients: those of Muon do, and of rules without momentum."""
    if section.name == "sgd":
        return section.momentum == 0
    return section.name == "muon" or section.betas[0] == 0


def check_optimizer(config: RunConfig) -> None:
    """Raise `KeyConflictError` if [optimizer] has settings without a use in this run."""
    section, parts, protocol = config.optimizer, trained_parts(config), config.run.protocol
    of_parts: dict[Part, PartSection] = {}
    for part in get_args(Part):
        own: PartSection | None = getattr(section, part)
        if own is not None and part not in parts:
            trained = " and ".join(parts) or "the whole model"
            remedy = "remove that table, or set its keys in [optimizer]."
            raise KeyConflictError(f"optimizer.{part}", f"{protocol} trains {trained}", remedy)
        if own is not None:
            of_parts[part] = own
    if not parts and section.schedule != "constant":
        remedy = 'remove it; in run.toml set decay = "cosine" in [round].'
        raise KeyConflictError("optimizer.schedule", "the schedule of rounds is round.decay", remedy)
    if config.privacy is not None and section.clip_norm is not None:
        sentence = "privacy.clip clips the gradient of every record already"
        raise KeyConflictError("optimizer.clip_norm", sentence, "remove it.")
    used = {section.of(part).name for part in parts} or {section.name}
    for key, rules in _RULES_WITH.items():
        sentence, remedy = f"only {', '.join(sorted(rules))} has it", "remove it, or choose another name."
        for part, own in of_parts.items():
            if getattr(own, key) is not None and section.of(part).name not in rules:
                raise KeyConflictError(f"optimizer.{part}.{key}", sentence, remedy)
        if getattr(section, key) != getattr(OptimizerSection(), key) and not used & rules:
            raise KeyConflictError(f"optimizer.{key}", sentence, remedy)
