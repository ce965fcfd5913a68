"""Reads a file that a user wrote. Every key is checked: an error names the file, the key and the fix."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from nightsplit.shared.config.run import RoundSection, RunConfig
from nightsplit.shared.errors import ConfigError
from nightsplit.shared.protocols import PROTOCOLS, ROUNDS
from nightsplit.shared.wire.message import SERVER

T = TypeVar("T", bound=Struct)


def load(path: Path, kind: type[T], overrides: Sequence[str] = ()) -> T:
    """Read a configuration file.

    Args:
        path: the TOML file.
        kind: what it must be: RunConfig, SiteConfig, ServerConfig, PolicyConfig.
        overrides: "section.key=value" with a TOML value (a bare word is taken as text).

    Raises:
        ConfigError: 101 unreadable, 102 not TOML, 103 a key is wrong.
    """
    try:
        content: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(101, f"{path}: {error.strerror}.", "check the path and who may read it.") from None
    except UnicodeDecodeError:
        raise ConfigError(102, f"{path}: not a UTF-8 text.", "save the file as UTF-8.") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(102, f"{path}: {error}.", "correct that line.") from None
    for override in overrides:
        _override(content, override)
    try:
        config = msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(
            103, f"{path}: {_explain(error)}.", "correct or remove that key; docs/configuration.md lists all keys."
        ) from None
    if isinstance(config, RunConfig):
        _check_run(path, config)
    return config


def _override(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *sections, last = key.strip().split(".")
    if not equals or not sections:
        raise ConfigError(
            103, f"--set {override}: not of the form section.key=value.", "write for example --set run.window=1."
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    for section in sections:
        content = content.setdefault(section, {})
    content[last] = value


def _explain(error: msgspec.ValidationError) -> str:
    """'Expected `int`, got `str` - at `$.run.window`' as 'run.window: expected int, got str'."""
    what, _, where = str(error).partition(" - at ")
    what = (
        what.replace("`", "")
        .replace("Object contains", "has an")
        .replace("Object missing", "misses the")
        .replace("field", "key")
    )
    return f"{where.strip('`').removeprefix('$').removeprefix('.') or 'file'}: {what[0].lower()}{what[1:]}"


def _check_run(path: Path, config: RunConfig) -> None:
    """What one key cannot tell alone."""
    run, data = config.run, config.data

    def refuse(key: str, what: str, remedy: str) -> None:
        raise ConfigError(103, f"{path}: {key}: {what}.", remedy)

    if len(set(run.sites)) != len(run.sites):
        refuse("run.sites", "a name occurs twice", "give every site its own name.")
    if SERVER in run.sites:
        refuse("run.sites", f"{SERVER!r} is the server's own name", "rename the site.")
    if run.quorum is not None and run.quorum > len(run.sites):
        refuse("run.quorum", f"{run.quorum} is more than there are sites", f"set at most {len(run.sites)}.")
    if data.validation + data.test >= 0.9:
        refuse("data.test", "validation and test leave less than a tenth to train on", "lower one of them.")
    inputs = len(data.features) or data.frames or 1  # features of a table, frames, or the one channel of an image
    if data.scaling == "run" and not inputs == len(data.mean) == len(data.spread):
        refuse(
            "data.mean",
            'scaling = "run" needs one mean and one spread per feature',
            'give both lists, or use scaling = "site".',
        )
    if bool(data.features) == (data.image_size is not None):
        refuse(
            "data.features", "a run has either features or image_size", "name a table's columns, or the images' side."
        )
    if data.features and data.frames is not None:
        refuse("data.frames", "a table has no frames", "leave it out, or set image_size in place of features.")
    if isinstance(data.window, tuple) and data.window[1] <= 0:
        refuse("data.window", f"a width of {data.window[1]}", "give [centre, width], the width above 0.")
    if run.bottoms == "averaged" and run.average_every < run.window:
        refuse(
            "run.average_every",
            f"{run.average_every} is below the window of {run.window}: averagings would overlap and correct twice",
            "set average_every to the window or more.",
        )
    if run.protocol not in PROTOCOLS:
        refuse("run.protocol", f"{run.protocol!r} is unknown", f"choose one of {', '.join(PROTOCOLS)}.")
    _check_round(refuse, config)
    if run.protocol == "split_u" and config.model.head_cut is None:
        refuse(
            "model.head_cut",
            "split_u needs to know where the head begins",
            "set head_cut, after cut and before the end.",
        )


def _check_round(refuse: Callable[[str, str, str], None], config: RunConfig) -> None:
    """What [round] needs, and what only systems of rounds have."""
    run, section = config.run, config.round
    if run.protocol not in ROUNDS:
        if section != RoundSection():
            refuse("round", f"{run.protocol} exchanges no weights", "remove [round], or choose another run.protocol.")
        if config.privacy is not None:
            refuse("privacy", f"{run.protocol} trains without noise", f"choose one of {', '.join(ROUNDS)}.")
        if config.model.initial is not None:
            refuse("model.initial", f"{run.protocol} begins with fresh weights", "remove it.")
        if config.task.kind == "segmentation":
            refuse("task.kind", f"{run.protocol} cannot segment", f"choose one of {', '.join(ROUNDS)}.")
        return
    if (config.model.initial is None) is not (config.model.initial_sha256 is None):
        refuse("model.initial_sha256", "a published model and its hash belong together", "give both, or none.")
    if (section.close == "all") is not (section.reports is None):
        refuse("round.reports", f'close = "{section.close}" is said', 'give reports for "quorum" and "buffered" alone.')
    if section.close == "quorum" and (section.reports or 0) > len(run.sites):
        refuse("round.reports", f"{section.reports} is more than there are sites", f"set at most {len(run.sites)}.")
    if section.close != "all" and run.order == "strict":
        refuse("run.order", f'strict order waits for every site, close = "{section.close}" does not', 'set "fair".')
    if run.protocol == "data_vectors" and "base" in run.sites:
        refuse("run.sites", "'base' is the name of the published model's file", "rename the site.")
    if run.protocol == "data_vectors" and (section.rounds > 1 or section.close == "buffered"):
        refuse("round.rounds", "vectors are reported once", 'set rounds = 1, and close = "all" or "quorum".')
    if config.privacy is not None and config.data.scaling == "site":
        refuse(
            "data.scaling",
            "mean and spread of a site's patients would shape every update without noise",
            'use "run" with public figures, or "none".',
        )
    if run.protocol == "fedavg_dp_seg" and config.privacy is None:
        refuse("privacy", f"{run.protocol} says how private it is", "give epsilon, delta and clip under [privacy].")
    if run.bottoms == "averaged":
        refuse("run.bottoms", "there are no bottoms: the whole model is averaged", "remove it.")
