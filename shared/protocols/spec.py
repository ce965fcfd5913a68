"""Specification of a protocol: one frozen object, `SPEC` of its file in this folder.

    shared/protocols/<name>.py           SPEC   payloads, checks of run.toml, texts for users
    site_worker/protocols/<name>.py      ROLE   class of the site's role; TARGETS_ROLE with run.learning = "targets"
    server_worker/protocols/<name>.py    ROLE   class of the server's role; likewise

A protocol is these three files. No other code names one: differences between protocols are attributes of `SPEC`.
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
    """Pattern of communication; each shape has a folder on either side.

    STREAM: a cut model; activations of one batch after the other, and their answers.
    ROUND: a whole model; updates from the sites' training are combined.
    QUERY: queries to a trained model; no run trains with such a protocol.
    """

    STREAM = auto()
    ROUND = auto()
    QUERY = auto()


TRAINING = (Shape.STREAM, Shape.ROUND)
"""Shapes that a run may have."""


@dataclass(frozen=True)
class Names:
    """Names and texts of a protocol for users.

    Attributes:
        weights: name of the server's weights in the report, and stem of their file's name.
        share: description of these weights.
        heading: column of the run's own model in a table of results.
        steps: unit that the server counts.
        message: name of a site's message, in the singular.
        fate: participle for messages that wait: "they will be trained".
        done: verb for messages that were processed: "the server trained on 412 batches".
        reply: name of the server's reply, in the singular.
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
    """Shapes of a run's model on which its messages depend; empty where a protocol does not use them.

    Attributes:
        cut: shape of one sample's activations at the cut.
        head: likewise at the head's input.
        bottom, top: weights by name, of which only dtype and shape matter.
        statistics: number of running statistics that are sent.
    """

    cut: tuple[int, ...] = ()
    head: tuple[int, ...] = ()
    bottom: Mapping[str, torch.Tensor] = field(default_factory=dict)
    top: Mapping[str, torch.Tensor] = field(default_factory=dict)
    statistics: int = 0


@dataclass(frozen=True)
class ProtocolSpec:
    """Specification of a protocol.

    Attributes:
        name: name in run.toml, and of its three files.
        paper: its source.
        shape: its pattern of communication.
        payloads: returns the contract of a run whose model has these shapes.
        names: texts for users.
        check: raises `KeyConflictError` if run.toml has settings that the protocol does not support.
        settings: returns the settings of a run in words, for the top of its report.
        has_head: whether the last layers and the labels stay at the site.
        trains_bottom: whether the site's layers are trained.
        learns_by_targets: whether run.learning may be "targets".
        uploads_once: whether a site sends its activations once, without waiting for any answer, and the server
            trains on its store of them.
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
    learns_by_targets: bool = False
    uploads_once: bool = False


PROTOCOLS: dict[str, ProtocolSpec] = {}
"""All protocols by name; filled when this package is imported."""


def spec_of(config: RunConfig) -> ProtocolSpec:
    """Return the protocol of a run."""
    return PROTOCOLS[config.run.protocol]


def systems(*shapes: Shape) -> list[str]:
    """Return the names of the protocols of these shapes."""
    return [name for name, spec in PROTOCOLS.items() if spec.shape in shapes]


def sketch(config: RunConfig) -> Contract:
    """Return the contract of a run without building its model: correct except for the lengths of tensors.

    It lets a hospital check a run before any code that run.toml names is executed.
    """
    weights = {"weight": torch.zeros(1)}
    return spec_of(config).payloads(config, Shapes((1,), (1,), weights, weights, 1))


def load_roles(side: str) -> dict[tuple[str, str], type[Any]]:
    """Return the role classes of the protocols that train, by protocol and run.learning, from their modules in `side`.

    Raises:
        ImportError: a protocol has none.
    """
    roles: dict[tuple[str, str], type[Any]] = {}
    for name, spec in PROTOCOLS.items():
        module = f"{side}.{name}"
        if find_spec(module) is None:
            raise ImportError(f"{name} has no role in {side}: write {module}, with the class of its role as ROLE")
        if spec.shape is not Shape.QUERY:  # its library is an extra, imported with the first query
            try:
                roles[name, "steps"] = import_module(module).ROLE
                if spec.learns_by_targets:
                    roles[name, "targets"] = import_module(module).TARGETS_ROLE
            except AttributeError as error:
                raise ImportError(f"{module} has no {error.name}: give the class of its role that name") from None
    return roles
