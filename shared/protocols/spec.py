"""What a system is: one frozen object, `SPEC` of its file in this folder.

    shared/protocols/<name>.py           SPEC   what is sent, what it needs of run.toml, what users read about it
    site_worker/protocols/<name>.py      ROLE   the site's side, a class
    server_worker/protocols/<name>.py    ROLE   the server's side, likewise

A system is these three files. Nothing else names one: whoever has to treat systems differently asks the `SPEC`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum, auto
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.wire.schema import Contract


class Shape(StrEnum):
    """How the participants of a system work together; each shape has a folder at either side.

    STREAM: a cut model; activations of one batch after the other, and their answers.
    ROUND: a whole model; what training at the sites changed in it is combined.
    QUERY: a trained model is asked; no run trains with such a system.
    """

    STREAM = auto()
    ROUND = auto()
    QUERY = auto()


TRAINING = (Shape.STREAM, Shape.ROUND)
"""Shapes that a run may have."""


@dataclass(frozen=True)
class Names:
    """What users read about a system.

    Attributes:
        weights: name of the server's weights in the report and of their file, without its ending.
        share: what these are of the model.
        heading: of the run's own model in a table of results.
        steps: what the server counts.
        message: what sites send, in the singular.
        fate: what becomes of it while the server is offline.
        done: what has become of it.
        reply: what comes back, in the singular.
    """

    weights: str
    share: str
    heading: str
    steps: str
    message: str
    fate: str
    done: str
    reply: str


@dataclass(frozen=True)
class Shapes:
    """What the messages of a run depend on in its model; a shape of system leaves out what it has none of.

    Attributes:
        cut: lengths of one sample's activations at the cut.
        head: likewise at the head's input.
        bottom, top: weights by name, of which dtype and shape count.
        statistics: how many running statistics travel.
    """

    cut: tuple[int, ...] = ()
    head: tuple[int, ...] = ()
    bottom: Mapping[str, torch.Tensor] = field(default_factory=dict)
    top: Mapping[str, torch.Tensor] = field(default_factory=dict)
    statistics: int = 0


@dataclass(frozen=True)
class ProtocolSpec:
    """A system.

    Attributes:
        name: as run.toml and three files call it.
        paper: where it comes from.
        shape: how its participants work together.
        payloads: the contract of a run whose model has these shapes.
        names: what users read.
        check: raises `KeyConflictError` where run.toml asks for what the system has not.
        settings: the settings of a run that its report begins with, in words.
        has_head: the last layers and the labels stay at the site.
        trains_bottom: the site's layers are trained.
        uploads_once: a site's activations are sent once, without waiting for any answer; the server trains on its
            store of them.
    """

    name: str
    paper: str
    shape: Shape
    payloads: Callable[[RunConfig, Shapes], Contract]
    names: Names
    check: Callable[[RunConfig], None] = lambda config: None
    settings: Callable[[RunConfig], str] = lambda config: ""
    has_head: bool = False
    trains_bottom: bool = True
    uploads_once: bool = False


PROTOCOLS: dict[str, ProtocolSpec] = {}
"""Every system by name; filled when this package is imported."""


def spec_of(config: RunConfig) -> ProtocolSpec:
    """Return the system of a run."""
    return PROTOCOLS[config.run.protocol]


def systems(*shapes: Shape) -> list[str]:
    """Return the names of the systems of these shapes."""
    return [name for name, spec in PROTOCOLS.items() if spec.shape in shapes]


def sketch(config: RunConfig) -> Contract:
    """Return the contract of a run whose model has not been made: right in all but the lengths of tensors.

    By it a hospital judges a run before any code is run that run.toml names.
    """
    some = {"weight": torch.zeros(1)}
    return spec_of(config).payloads(config, Shapes((1,), (1,), some, some, 1))


def load_roles(side: str) -> dict[str, type[Any]]:
    """Return the role class of every system that a run may have, at one side.

    Args:
        side: the package with a module for each system.

    Raises:
        ImportError: a system lacks its module there, or the module its `ROLE`.
    """
    roles: dict[str, type[Any]] = {}
    for name, spec in PROTOCOLS.items():
        module = f"{side}.{name}"
        if find_spec(module) is None:
            raise ImportError(f"{name} has no side in {side}: write {module}, with the class of its role as ROLE")
        if spec.shape is not Shape.QUERY:  # whose library is an extra, and is imported when somebody asks
            try:
                roles[name] = import_module(module).ROLE
            except AttributeError:
                raise ImportError(f"{module} has no ROLE: give the class of its role that name") from None
    return roles
