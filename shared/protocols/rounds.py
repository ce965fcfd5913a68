"""Round shape: sites train and send updates of the model; the server combines them and answers with the model.

    site     UPDATE 1 ...... UPDATE n          REPORT
                 │     ▲         │     ▲          │     ▲
                 ▼     │         ▼     │          ▼     │
    server       MODEL 1         MODEL n (final)        FINISH

Every participant builds the first model itself, so that a site can train before a server is up. Update u
of a site is the change of its weights since the model that answered update u - 1; it is answered by one
model, so that a site's messages depend only on the sequence of models that it received. Update, model and
farewell are each sent in the slices of a `WeightLayout`; a slice is a sequenced message, hence applied
exactly once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.config.section import KeyConflictError
from nightsplit.shared.errors import Refused, mismatch
from nightsplit.shared.models.layout import WeightLayout
from nightsplit.shared.protocols.handshake import HANDSHAKE, PROGRESS
from nightsplit.shared.protocols.spec import Names, ProtocolSpec, Shape, Shapes
from nightsplit.shared.wire.message import Kind, Message
from nightsplit.shared.wire.schema import Contract, Payload, Reveals, ScalarSpec, TensorSpec, contract

HEADER_BYTES = 32 * 2**10
"""Bytes of a message reserved for its header, which holds figures of held-out patients."""

VALUE_MAX = 1e20
"""Largest weight or change of one: weighted sums over a million sites of a billion samples stay finite."""

NAMES = Names(
    weights="model", share="the model", heading="federated", steps="updates of sites",
    message="report", fate="processed", done="processed", reply="answer",
)  # fmt: skip

FIGURES = ScalarSpec(str, Reveals.COUNTS)
"""Metrics of a site's held-out patients."""


def payloads(config: RunConfig, shapes: Shapes) -> Contract:
    """Return the contract of a run. `version` in headers is the model's: the number of combined rounds."""

    def part(reveals: Reveals | None = None) -> dict[str, TensorSpec]:
        return {"values": TensorSpec(torch.float32, ("slice",), reveals=reveals)}

    return contract(
        *HANDSHAKE,
        Payload(Kind.UPDATE, part(Reveals.WEIGHTS), {"metrics": FIGURES}),
        Payload(Kind.MODEL, part(), {"final": ScalarSpec(bool), **PROGRESS}, sets_weights=True),
        Payload(Kind.REPORT, scalars={"metrics": FIGURES}),
        Payload(Kind.FINISH, part(), {"summary": ScalarSpec(str), **PROGRESS}, sets_weights=True),
    )


def settings(config: RunConfig) -> str:
    """Return the settings of a run in words."""
    return f"{config.run.order} order, {config.round.combine.replace('_', ' ')} of {config.round.close}"


def check(config: RunConfig) -> None:
    """Raise `KeyConflictError` if run.toml has settings that no protocol of this shape supports."""
    run, section = config.run, config.round
    if section.close == "quorum" and (section.reports or 0) > len(run.sites):
        sentence = f"{section.reports} is more than the number of sites"
        raise KeyConflictError("round.reports", sentence, f"set at most {len(run.sites)}.")
    if section.close != "all" and run.order == "strict":
        sentence = f'strict order waits for every site, close = "{section.close}" does not'
        raise KeyConflictError("run.order", sentence, 'set "fair".')
    if config.privacy is not None and config.data.scaling == "site":
        sentence = "mean and spread of a site's patients would affect every update without noise"
        raise KeyConflictError("data.scaling", sentence, 'use "run" with public figures, or "none".')
    if run.bottoms == "averaged":
        raise KeyConflictError("run.bottoms", "there are no bottoms: the whole model is averaged", "remove it.")


protocol = partial(ProtocolSpec, shape=Shape.ROUND, settings=settings, names=NAMES)
"""Specification of a protocol of this shape."""


def slice_length(config: RunConfig) -> int:
    """Return the number of elements of a slice."""
    return (config.wire.message_bytes - HEADER_BYTES) // 4


class Work(NamedTuple):
    """Work of a site for an update: its training batches, and the number of samples in all of them."""

    batches: int
    samples: int

    @classmethod
    def of(cls, config: RunConfig, train: int) -> Work:
        """Return the work of a site with `train` training samples."""
        if config.round.local_batches is not None:
            return cls(config.round.local_batches, config.round.local_batches * min(config.run.batch_size, train))
        return cls(config.round.local_epochs * -(-train // config.run.batch_size), config.round.local_epochs * train)


def updates_max(config: RunConfig) -> int:
    """Return the number of updates that a site may send in a run."""
    # With "buffered" a fast site may send all the updates of a round.
    return config.round.rounds * ((config.round.reports or 1) if config.round.close == "buffered" else 1)


def is_evaluated(config: RunConfig, version: int) -> bool:
    """Return whether sites evaluate this version of the model; they always evaluate the final one."""
    return version > 0 and version % config.run.evaluate_every == 0


@dataclass(frozen=True)
class RoundSequence:
    """Sequence of a site's messages: at most `updates` updates of `slices` slices each, and a report after them.

    `train` is the number of its training samples.
    """

    train: int
    updates: int
    slices: int

    @classmethod
    def of(cls, config: RunConfig, train: int, layout: WeightLayout) -> RoundSequence:
        """Return the sequence of a site with `train` training samples."""
        return cls(train, updates_max(config), layout.slices)

    @property
    def last(self) -> int:
        """Number of the last message."""
        return self.updates * self.slices + 1

    @property
    def last_answer(self) -> int:
        """Number of the server's last message, the end of the farewell."""
        return self.last - 1 + self.slices

    def at(self, seq: int) -> tuple[int, int]:
        """Return update and slice, both from 1, of a site's message `seq`, or of the server's answer to it."""
        update, number = divmod(seq - 1, self.slices)
        return update + 1, number + 1


def check_slice(message: Message, layout: WeightLayout, number: int) -> torch.Tensor:
    """Return the values of slice `number`; Refused 306 if the layout has another length, 307 as in `check_size`."""
    values, bounds = message.tensors["values"], layout.slice(number)
    expected = bounds.stop - bounds.start
    if len(values) != expected:
        raise mismatch(f"{message.header.message_id} has {len(values)} values, slice {number} has {expected}.", 306)
    check_size(message, values)
    return values


def check_size(message: Message, values: torch.Tensor) -> None:
    """Raise Refused 307 if a value is so large that sums might not be finite."""
    if values.abs().max() > VALUE_MAX:
        sentence = f"{message.header.message_id} has values beyond {VALUE_MAX:g}."
        raise Refused(307, sentence, "inspect that site's training.")


def bounded(values: torch.Tensor) -> torch.Tensor:
    """Clamp values to the range of `check_size`; values within it stay the same to the bit."""
    return values.nan_to_num(0.0).clamp(-VALUE_MAX, VALUE_MAX)
