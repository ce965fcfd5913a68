"""Fit of layers to a block of stored batches, one batch at a time, so that a worker beats, saves and stops in between.

train     `passes` passes over the block, each in an order of its own
measure   sums over the block that give the length of its displacements
answer    the displacement of each batch
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import torch

from nightsplit.shared.learning.displacement import Sums
from nightsplit.shared.learning.seeds import Seed, generator_at, seed_for

Phase = Literal["train", "measure", "answer"]


@dataclass(frozen=True)
class Unit:
    """Unit of a fit.

    Attributes:
        phase: its kind.
        number: pass over the block, from 0, within "train".
        item: the item whose batch it is about.
    """

    phase: Phase
    number: int
    item: int


@dataclass(frozen=True)
class BlockFit:
    """Progress of a fit.

    Attributes:
        part: layers that are fitted.
        site: whose block it is.
        block: its number.
        items: items of the block that have come with all that the fit needs.
        passes: number of passes.
        answers: whether the fit ends with displacements.
        done: units that are done.
        sums: of the units "measure" so far.
    """

    part: str
    site: str
    block: int
    items: tuple[int, ...]
    passes: int
    answers: bool
    done: int = 0
    sums: Sums = field(default_factory=Sums)

    def unit(self, seed: Seed) -> Unit | None:
        """Return the next unit; None after the last. `seed` is of the order of the passes."""
        number, index = divmod(self.done, len(self.items))
        if number < self.passes:
            return Unit("train", number, self._order(seed, number)[index])
        if not self.answers:
            return None
        if number == self.passes:
            return Unit("measure", 0, self.items[index])
        return Unit("answer", 0, self.items[index]) if number == self.passes + 1 else None

    def advanced(self, sums: Sums | None = None) -> Self:
        """Return the fit after its next unit, which has these sums."""
        return replace(self, done=self.done + 1, sums=self.sums + sums if sums else self.sums)

    def facts(self) -> dict[str, Any]:
        """Return the entries of a snapshot."""
        return {
            "part": self.part, "site": self.site, "block": self.block, "items": list(self.items),
            "answers": self.answers, "done": self.done, "sums": [self.sums.numerator, self.sums.denominator],
        }  # fmt: skip

    @classmethod
    def of(cls, facts: Mapping[str, Any], passes: int) -> Self:
        """Return the fit of the entries of a snapshot."""
        entries = {**facts, "items": tuple(facts["items"]), "sums": Sums(*facts["sums"])}
        return cls(**entries, passes=passes)

    def _order(self, seed: Seed, number: int) -> tuple[int, ...]:
        if number == 0:
            return self.items
        generator = generator_at(seed_for(seed, "fit", self.part, self.site, self.block, number))
        return tuple(self.items[i] for i in torch.randperm(len(self.items), generator=generator).tolist())
