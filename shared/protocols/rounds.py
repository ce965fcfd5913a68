"""What the Round systems have in common: sites train, and report what changed; the server combines, and answers.

    site     UPDATE 1 ...... UPDATE n          REPORT
                 │     ▲         │     ▲          │     ▲
                 ▼     │         ▼     │          ▼     │
    server       MODEL 1         MODEL n (final)        FINISH

Every participant makes the first model itself, so a site can train before a server is there. Update
u of a site is what changed in its weights since the model that answered update u - 1; it is answered
by one model, so what a site sends depends on nothing but the sequence of models that it got. Update,
model and farewell each travel in the slices of a `WeightLayout`; a slice is a message in sequence, hence
applied exactly once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.config.section import KeyConflict
from nightsplit.shared.errors import Refused, mismatch
from nightsplit.shared.models.layout import WeightLayout
from nightsplit.shared.protocols.handshake import AGREEMENT, VERDICT
from nightsplit.shared.protocols.spec import Names, Shapes
from nightsplit.shared.wire.message import Kind, Message
from nightsplit.shared.wire.schema import Contract, Payload, Reveals, ScalarSpec, TensorSpec, contract

HEADER_BYTES = 32 * 2**10
"""Of a message, left for its header; figures of held-out patients are in it."""

LARGEST = 1e20
"""Of a weight, or of what changed in one: weighted sums over a million sites of a billion samples stay finite."""

NAMES = Names(
    weights="model", share="the model", heading="federated", steps="updates of sites",
    message="report", fate="processed", done="processed", reply="answer",
)  # fmt: skip

FIGURES = ScalarSpec(str, Reveals.COUNTS)
"""The figures that a site has measured on its held-out patients."""


def payloads(config: RunConfig, shapes: Shapes) -> Contract:
    """Return the contract of a run. `version` in headers is the model's: how often the server had combined."""

    def part(reveals: Reveals | None = None) -> dict[str, TensorSpec]:
        return {"values": TensorSpec(torch.float32, ("slice",), reveals=reveals)}

    return contract(
        *AGREEMENT,
        Payload(Kind.UPDATE, part(Reveals.WEIGHTS), {"metrics": FIGURES}),
        Payload(Kind.MODEL, part(), {"final": ScalarSpec(bool), **VERDICT}, sets_weights=True),
        Payload(Kind.REPORT, scalars={"metrics": FIGURES}),
        Payload(Kind.FINISH, part(), {"summary": ScalarSpec(str), **VERDICT}, sets_weights=True),
    )


def settings(config: RunConfig) -> str:
    """Return the settings of a run in words."""
    return f"{config.run.order} order, {config.round.combine} of {config.round.close}"


def check(config: RunConfig) -> None:
    """Raise `KeyConflict` where run.toml asks for what no system has that exchanges weights."""
    run, section = config.run, config.round
    if section.close == "quorum" and (section.reports or 0) > len(run.sites):
        what = f"{section.reports} is more than there are sites"
        raise KeyConflict("round.reports", what, f"set at most {len(run.sites)}.")
    if section.close != "all" and run.order == "strict":
        what = f'strict order waits for every site, close = "{section.close}" does not'
        raise KeyConflict("run.order", what, 'set "fair".')
    if config.privacy is not None and config.data.scaling == "site":
        what = "mean and spread of a site's patients would shape every update without noise"
        raise KeyConflict("data.scaling", what, 'use "run" with public figures, or "none".')
    if run.bottoms == "averaged":
        raise KeyConflict("run.bottoms", "there are no bottoms: the whole model is averaged", "remove it.")


def elements(config: RunConfig) -> int:
    """Most elements of a slice."""
    return (config.wire.message_bytes - HEADER_BYTES) // 4


class Work(NamedTuple):
    """What a site does for an update: its training batches, and the samples in them together."""

    batches: int
    samples: int

    @classmethod
    def of(cls, config: RunConfig, train: int) -> Work:
        """Of a site with `train` training samples."""
        if config.round.local_batches is not None:
            return cls(config.round.local_batches, config.round.local_batches * min(config.run.batch_size, train))
        return cls(config.round.local_epochs * -(-train // config.run.batch_size), config.round.local_epochs * train)


def most_updates(config: RunConfig) -> int:
    """Updates that a site may send in a run."""
    # With "buffered" a fast site may send more than one update for each time the server combines.
    return config.round.rounds * (config.round.reports or 1 if config.round.close == "buffered" else 1)


def is_evaluated(config: RunConfig, version: int) -> bool:
    """Whether sites judge a model that is not the final one; the final one always is."""
    return version > 0 and version % config.run.evaluate_every == 0


@dataclass(frozen=True)
class RoundSequence:
    """What a site with `train` samples sends: at most so many updates in slices each, and a report behind them."""

    train: int
    updates: int
    slices: int

    @classmethod
    def of(cls, config: RunConfig, train: int, layout: WeightLayout) -> RoundSequence:
        """Of a site with `train` training samples."""
        return cls(train, most_updates(config), layout.slices)

    @property
    def last(self) -> int:
        """Number of the last message."""
        return self.updates * self.slices + 1

    @property
    def answers(self) -> int:
        """Number of the server's last message, with which the farewell ends."""
        return self.last - 1 + self.slices

    def at(self, seq: int) -> tuple[int, int]:
        """Update and slice, both from 1, of a site's message `seq`, or of the server's that answers it."""
        update, number = divmod(seq - 1, self.slices)
        return update + 1, number + 1


def check_slice(message: Message, layout: WeightLayout, number: int) -> torch.Tensor:
    """The values of slice `number`.

    Raises:
        Refused: 306 they are not as many as the layout says; 307 as `check_size`.
    """
    values, place = message.tensors["values"], layout.slice(number)
    expected = place.stop - place.start
    if len(values) != expected:
        raise mismatch(f"{message.header.message_id} has {len(values)} values, slice {number} has {expected}.", 306)
    check_size(message, values)
    return values


def check_size(message: Message, values: torch.Tensor) -> None:
    """Raise Refused 307 where a value is so large that sums of such would not be finite."""
    if values.abs().max() > LARGEST:
        what = f"{message.header.message_id} has values beyond {LARGEST:g}."
        raise Refused(307, what, "look at that site's training.")


def bounded(values: torch.Tensor) -> torch.Tensor:
    """Values that `check_size` takes, float32 as given: to the bit the same where they were already."""
    return values.nan_to_num(0.0).clamp(-LARGEST, LARGEST)
