"""Reads run.toml, and has the run's system check it."""

from collections.abc import Sequence
from pathlib import Path

from nightsplit.shared.config.load import conflict_in, load
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.config.section import KeyConflict
from nightsplit.shared.config.suggest import did_you_mean
from nightsplit.shared.protocols.spec import TRAINING, spec_of, systems


def load_run(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run.toml; as `load`, with ConfigError 103 also when the run's system cannot work with it."""
    config = load(path, RunConfig, overrides)
    try:
        known = systems(*TRAINING)
        if config.run.protocol not in known:
            what = f"{config.run.protocol!r} is unknown{did_you_mean(config.run.protocol, known)}"
            raise KeyConflict("run.protocol", what, f"choose one of {', '.join(known)}.")
        spec_of(config).check(config)
    except KeyConflict as conflict:
        raise conflict_in(path, conflict) from None
    return config
