"""Factory of a run's model: a function from one of three places.

nightsplit.models:mlp       a network of nightsplit
model.py:make               a file beside run.toml, of the hash that run.toml names
package.module:function     an installed package, which the policy of a hospital has to list
"""

import difflib
import hashlib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib.abc import InspectLoader
from importlib.metadata import packages_distributions, version
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import torch
from typing_extensions import override

from nightsplit.shared.config.run import OWN_NETWORKS, ModelSection
from nightsplit.shared.errors import ConfigError
from nightsplit.shared.learning.seeds import Seed, seed_for, seeded

# Stack frames in these files are not the user's code.
_FOREIGN_FILES = (str(Path(torch.__file__).parent), "<frozen ", str(Path(__file__).parent))


@dataclass(frozen=True)
class Code:
    """Code that builds a run's model.

    Attributes:
        version: hash of a file, or name and version of each package; None for a network of nightsplit.
        text: the file's text; None if the code is no file.
    """

    version: str | None = None
    text: str | None = None


def make(model: ModelSection, seed: Seed, folder: Path) -> Any:
    """Call the factory with torch's CPU generator at a seed that depends on `seed` alone.

    Args:
        folder: folder of run.toml.

    Raises:
        ConfigError: 104 the factory cannot be found or called; others as `read_code`.
    """
    factory = _find(model, folder)
    try:
        inspect.signature(factory).bind(**model.settings)
    except TypeError as error:
        sentence = f"{model.factory} does not take model.settings: {error}{_source(factory)}."
        raise ConfigError(104, sentence, f"set model.settings to its arguments {_arguments(factory)}.") from error
    except ValueError:
        pass  # a factory written in C has no signature: the call itself fails
    try:
        with seeded(seed_for(seed, "model")):
            return factory(**model.settings)
    except Exception as error:
        sentence = f"{model.factory} failed: {describe(error)}."
        raise ConfigError(104, sentence, "correct model.settings, or the factory at that line.") from error


def read_code(model: ModelSection, folder: Path) -> Code:
    """Return the code that builds a model. Nothing is imported.

    Raises:
        ConfigError: 101 the file cannot be read, 103 it is a link out of the run's folder, 104 it is not plain text, or
            the package is not installed, 119 it has another hash.
    """
    if model.code_file is not None:
        return _read_file(model, locate_run_file(folder, model.code_file))
    if model.package is None:
        return Code()
    found = sorted(set(packages_distributions().get(model.package.partition(".")[0], ())))
    if not found:
        sentence = f"{model.factory} is in no installed package."
        remedy = 'install it; or name a file beside run.toml: factory = "model.py:make", with code_sha256.'
        raise ConfigError(104, sentence, remedy)
    return Code(", ".join(f"{name} {version(name)}" for name in found))


def locate_run_file(folder: Path, name: str) -> Path:
    """Return the path of a file that run.toml names; ConfigError 103 if it is not a file of the run's folder."""
    path = Path(os.path.realpath(folder / name))  # unlike `resolve`, does not fail at a link to itself
    if not path.is_relative_to(folder.resolve()) or (path.exists() and not path.is_file()):
        sentence = f"{folder / name}: it leads out of the run's folder, or is no file."
        raise ConfigError(103, sentence, "put the file itself beside run.toml.")
    return path


def _read_file(model: ModelSection, path: Path) -> Code:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(101, f"{path}: {error.strerror}.", "put the file of model.factory beside run.toml.") from None
    found, expected = hashlib.sha256(content).hexdigest(), str(model.code_sha256).lower()
    if found != expected:
        sentence = f"{path} has sha256 {found[:12]}..., run.toml names {expected[:12]}..."
        raise ConfigError(119, sentence, "ask for the file that belongs to run.toml; nothing of this one was run.")
    try:
        # As text, or a declared encoding would run other code than what a reader sees.
        text = content.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise ConfigError(104, f"{path}: not UTF-8 text.", "save the file as UTF-8.") from None
    for number, line in enumerate(text.split("\n"), start=1):
        hidden = next((character for character in line if not character.isprintable() and character != "\t"), None)
        if hidden is not None:
            sentence = f"{path}, line {number}: the character U+{ord(hidden):04X} cannot be seen."
            raise ConfigError(104, sentence, "write it as an escape, so that a reader sees the code that runs.")
    return Code(f"{model.code_file} sha256 {found}", text)


def _find(model: ModelSection, folder: Path) -> Callable[..., Any]:
    place, _, function = model.factory.partition(":")
    module = _import(model, place, folder)
    defined = [key for key, value in vars(module).items() if _belongs(value, module)]
    own = [*getattr(module, "__all__", defined)]
    factory = getattr(module, function, None)
    is_own = function in own if place == OWN_NETWORKS else _belongs(factory, module)
    if callable(factory) and is_own:
        return factory  # type: ignore[no-any-return]
    near = difflib.get_close_matches(function, own, n=1, cutoff=0.0)
    remedy = f'set model.factory = "{place}:{near[0]}".' if near else "define it, or name another module."
    raise ConfigError(104, f"{place} has no function {function} of its own.", remedy)


def _belongs(value: object, module: ModuleType) -> bool:
    """Return whether a package of the module defines `value`, which it did not just import from elsewhere."""
    return str(getattr(value, "__module__", "")).partition(".")[0] == module.__name__.partition(".")[0]


def _import(model: ModelSection, place: str, folder: Path) -> ModuleType:
    """Import the factory's module, or run its file."""
    try:
        return importlib.import_module(place) if model.code_file is None else _run(model, folder)
    except ConfigError:
        raise
    # A script without a main guard may call sys.exit, which would end the worker without a message.
    except (Exception, SystemExit) as error:
        sentence = f"{place} cannot be imported: {describe(error)}."
        raise ConfigError(104, sentence, "correct model.factory or that code, or install what it lacks.") from error


class _CodeLoader(InspectLoader):
    """Loader of a module whose text was read and verified before."""

    def __init__(self, text: str, path: Path) -> None:
        self._text, self._path = text, path

    @override
    def get_source(self, fullname: str) -> str:
        return self._text

    @override
    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self._text, str(self._path))


def _run(model: ModelSection, folder: Path) -> ModuleType:
    """Run the factory's file, once for each content, and return its module."""
    assert model.code_file is not None
    name = f"nightsplit_model_{str(model.code_sha256).lower()}"
    if name in sys.modules:
        return sys.modules[name]
    text = read_code(model, folder).text
    assert text is not None
    loader = _CodeLoader(text, folder / model.code_file)
    spec = spec_from_loader(name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def describe(error: BaseException) -> str:
    """Return type, message, file and line of an exception from the user's code."""
    message = " ".join(str(error).split()).rstrip(".") or "no message"
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg} ({error.filename}, line {error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_FOREIGN_FILES)]
    frame = (own or frames)[-1]
    return f"{type(error).__name__}: {message} ({frame.filename}, line {frame.lineno})"


def _arguments(factory: Callable[..., Any]) -> str:
    signature = inspect.signature(factory).replace(return_annotation=inspect.Signature.empty)
    return str(signature).replace("'", "")  # annotations are quoted under `from __future__ import annotations`


def _source(factory: Callable[..., Any]) -> str:
    try:
        return f" ({inspect.getsourcefile(factory)}, line {inspect.getsourcelines(factory)[1]})"
    except (OSError, TypeError):
        return ""
