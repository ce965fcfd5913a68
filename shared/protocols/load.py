"""Loader of run.toml, with the checks of the run's protocol."""

from collections.abc import Sequence
from pathlib import Path

from nightsplit.shared.config.load import conflict_in, load
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.config.section import KeyConflictError
from nightsplit.shared.config.suggest import did_you_mean
from nightsplit.shared.protocols.parts import check_optimizer
from nightsplit.shared.protocols.spec import PROTOCOLS, TRAINING, spec_of, systems


def load_run(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run.toml; as `load`, with ConfigError 103 also if the run's protocol does not support it."""
    config = load(path, RunConfig, overrides)
    try:
        protocols = systems(*TRAINING)
        if config.run.protocol not in protocols:
            remedy = f"choose one of {', '.join(protocols)}."
            hint = did_you_mean(config.run.protocol, protocols)
            raise KeyConflictError("run.protocol", f"{config.run.protocol!r} is unknown{hint}", remedy)
        spec = spec_of(config)
        if config.run.learning == "targets" and not spec.learns_by_targets:
            learning = ", ".join(name for name, other in PROTOCOLS.items() if other.learns_by_targets)
            remedy = f"remove it, or choose one of {learning}."
            raise KeyConflictError("run.learning", f"{spec.name} has no late gradients to replace by targets", remedy)
        spec.check(config)
        check_optimizer(config)
    except KeyConflictError as conflict:
        raise conflict_in(path, conflict) from None
    return config
