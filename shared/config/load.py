"""Loader of configuration files. Every key is checked: an error names the file, the key and the fix."""

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import Struct
from msgspec.inspect import type_info

from nightsplit.shared.config.section import KeyConflictError
from nightsplit.shared.config.suggest import did_you_mean, words_of
from nightsplit.shared.errors import ConfigError

T = TypeVar("T", bound=Struct)


def load(path: Path, kind: type[T], overrides: Sequence[str] = ()) -> T:
    """Read a configuration file.

    Args:
        kind: class of its content: SiteConfig, ServerConfig or PolicyConfig. A run.toml is read by
            `nightsplit.shared.protocols.load.load_run`.
        overrides: "section.key=value" with a TOML value (a bare word is taken as text).

    Raises:
        ConfigError: 101 unreadable, 102 not TOML, 103 a key is wrong.
    """
    try:
        content: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(101, f"{path}: {error.strerror}.", "check the path and the file's permissions.") from None
    except UnicodeDecodeError:
        raise ConfigError(102, f"{path}: not UTF-8 text.", "save the file as UTF-8.") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(102, f"{path}: {error}.", "correct that line.") from None
    for override in overrides:
        _override(content, override)
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        sentence, key = _split_error(error)
        if isinstance(error.__cause__, KeyConflictError):
            raise conflict_in(path, error.__cause__, key) from None
        unknown = re.search("(?:unknown key|enum value) '?(.+?)'?$", sentence)
        hint = did_you_mean(unknown[1], words_of(type_info(kind))) if unknown else ""
        remedy = "correct or remove that key; docs/reference/configuration.md lists all keys."
        raise ConfigError(103, f"{path}: {key or 'file'}: {sentence}{hint}.", remedy) from None


def conflict_in(path: Path, conflict: KeyConflictError, table: str = "") -> ConfigError:
    """Return the ConfigError for a conflict in a table of a file, or in the file as a whole."""
    key = f"{table}.{conflict.key}" if table else conflict.key
    return ConfigError(103, f"{path}: {key}: {conflict.sentence}.", conflict.remedy)


def _override(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *sections, last = key.strip().split(".")
    if not equals or not sections:
        sentence = f"--set {override}: not of the form section.key=value."
        raise ConfigError(103, sentence, "write for example --set run.window=1.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    for section in sections:
        content = content.setdefault(section, {})
    content[last] = value


def _split_error(error: msgspec.ValidationError) -> tuple[str, str]:
    """Split 'Expected `int`, got `str` - at `$.run.window`' into 'expected int, got str' and 'run.window'."""
    text = str(error)
    sentence, key = text.rsplit(" - at ", 1) if " - at " in text else (text, "")
    for theirs, ours in (("`", ""), ("Object contains", "has an"), ("Object missing", "misses the"), ("field", "key")):
        sentence = sentence.replace(theirs, ours)
    return f"{sentence[0].lower()}{sentence[1:]}", key.strip("`").removeprefix("$").removeprefix(".")
