"""Reads a file that a user wrote. Every key is checked: an error names the file, the key and the fix."""

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import Struct
from msgspec.inspect import type_info

from nightsplit.shared.config.section import KeyConflict
from nightsplit.shared.config.suggest import did_you_mean, words_of
from nightsplit.shared.errors import ConfigError

T = TypeVar("T", bound=Struct)


def load(path: Path, kind: type[T], overrides: Sequence[str] = ()) -> T:
    """Read a configuration file.

    Args:
        path: the TOML file.
        kind: what it must be: SiteConfig, ServerConfig, PolicyConfig. A run.toml is read by
            `nightsplit.shared.protocols.load.load_run`.
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
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        what, where = _place(error)
        if isinstance(error.__cause__, KeyConflict):
            raise conflict_in(path, error.__cause__, where) from None
        unknown = re.search("(?:unknown key|enum value) '?(.+?)'?$", what)
        meant = did_you_mean(unknown[1], words_of(type_info(kind))) if unknown else ""
        what = f"{path}: {where or 'file'}: {what}{meant}."
        remedy = "correct or remove that key; docs/reference/configuration.md lists all keys."
        raise ConfigError(103, what, remedy) from None


def conflict_in(path: Path, conflict: KeyConflict, table: str = "") -> ConfigError:
    """Return the error of a conflict in a file, found in a table of it or in the whole."""
    key = f"{table}.{conflict.key}" if table else conflict.key
    return ConfigError(103, f"{path}: {key}: {conflict.what}.", conflict.remedy)


def _override(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *sections, last = key.strip().split(".")
    if not equals or not sections:
        what = f"--set {override}: not of the form section.key=value."
        raise ConfigError(103, what, "write for example --set run.window=1.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    for section in sections:
        content = content.setdefault(section, {})
    content[last] = value


def _place(error: msgspec.ValidationError) -> tuple[str, str]:
    """Divide 'Expected `int`, got `str` - at `$.run.window`' into 'expected int, got str' and 'run.window'."""
    what, _, where = str(error).rpartition(" - at ") if " - at " in str(error) else (str(error), "", "")
    for theirs, ours in (("`", ""), ("Object contains", "has an"), ("Object missing", "misses the"), ("field", "key")):
        what = what.replace(theirs, ours)
    return f"{what[0].lower()}{what[1:]}", where.strip("`").removeprefix("$").removeprefix(".")
