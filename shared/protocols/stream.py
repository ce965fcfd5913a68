"""What the Stream systems have in common: what their messages carry, and in which order a site sends.

split_labels   site: Smashed + targets         server: CutGradient
split_frozen   site: Smashed + targets, once   server: nothing
split_u        site: Smashed, HeadGradient     server: HeadInput, CutGradient

Every message of a site but split_frozen's has exactly one answer, so that the server's sequence to
a site runs in step with the site's own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import torch
from torch import nn

from nightsplit.shared.config.run import RoundSection, RunConfig
from nightsplit.shared.config.section import KeyConflict
from nightsplit.shared.errors import mismatch
from nightsplit.shared.protocols.handshake import REFUSAL, VERDICT
from nightsplit.shared.protocols.plan import Item, Place, Plan
from nightsplit.shared.protocols.spec import Names, Shape, Shapes, systems
from nightsplit.shared.wire.message import Kind
from nightsplit.shared.wire.schema import Payload, Reveals, ScalarSpec, TensorSpec

NAMES = Names(
    weights="top", share="the server's half of the model", heading="split", steps="training steps at the server",
    message="batch", fate="trained", done="trained on", reply="answer",
)  # fmt: skip


def settings(config: RunConfig) -> str:
    """Return the settings of a run in words."""
    run = config.run
    return f"{run.order} order, window {run.window}, {run.bottoms} bottoms"


def check(config: RunConfig) -> None:
    """Raise `KeyConflict` where run.toml asks for what no system has that exchanges activations."""
    protocol, rounds = config.run.protocol, ", ".join(systems(Shape.ROUND))
    if config.round != RoundSection():
        raise KeyConflict(
            "round", f"{protocol} exchanges no weights", "remove [round], or choose another run.protocol."
        )
    if config.privacy is not None:
        raise KeyConflict("privacy", f"{protocol} trains without noise", f"choose one of {rounds}.")
    if config.model.initial is not None:
        raise KeyConflict("model.initial", f"{protocol} begins with fresh weights", "remove it.")
    if config.task.kind == "segmentation":
        raise KeyConflict("task.kind", f"{protocol} cannot segment", f"choose one of {rounds}.")


def activations(config: RunConfig, shapes: Shapes, stored: bool = False) -> TensorSpec:
    """Return the spec of smashed data (batch, *cut); a server with a tape, too, stores what it gets."""
    reveals = Reveals.STORED_ACTIVATIONS if stored or config.run.tape else Reveals.ACTIVATIONS
    return TensorSpec(torch.float32, ("batch", *shapes.cut), config.wire.smashed, config.wire.zstd, reveals)


def targets(config: RunConfig) -> TensorSpec:
    """Return the spec of labels (batch,) that go with smashed data."""
    dtype = torch.int64 if config.task.kind == "multiclass" else torch.float32
    return TensorSpec(dtype, ("batch",), reveals=Reveals.LABELS)


def gradient(config: RunConfig, shape: tuple[int, ...], reveals: Reveals | None = None) -> dict[str, TensorSpec]:
    """Return the spec of a gradient (batch, *shape)."""
    wire = config.wire
    return {"gradient": TensorSpec(torch.float32, ("batch", *shape), wire.gradient, wire.zstd, reveals)}


def answers(config: RunConfig, shapes: Shapes) -> tuple[Payload, ...]:
    """Return what the server of a trained bottom may answer to any message, and averaging where the run has it."""
    payloads = (
        Payload(Kind.CUT_GRADIENT, gradient(config, shapes.cut), VERDICT),
        Payload(Kind.NOTED, scalars=VERDICT),
        Payload(Kind.REFUSED, scalars={**REFUSAL, **VERDICT}),
    )
    if config.run.bottoms != "averaged":
        return payloads
    return (
        *payloads,
        Payload(Kind.BOTTOM, weights_spec(shapes.bottom, Reveals.WEIGHTS)),
        Payload(Kind.AVERAGE, weights_spec(shapes.bottom), VERDICT, sets_weights=True),
    )


def finish(config: RunConfig, shapes: Shapes) -> Payload:
    """Return the server's last message: what came of the run, and the top where the run exports it."""
    top = weights_spec(shapes.top) if config.run.export_top else {}
    return Payload(Kind.FINISH, top, {"summary": ScalarSpec(str), **VERDICT})


def weights_spec(weights: Mapping[str, torch.Tensor], reveals: Reveals | None = None) -> dict[str, TensorSpec]:
    """Return a spec for each of these weights, as they are, at full precision."""
    return {name: TensorSpec(t.dtype, tuple(t.shape), reveals=reveals) for name, t in weights.items()}


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and floating-point buffers by name; counters (integer buffers) stay where they are."""
    return {name: tensor for name, tensor in module.state_dict().items() if tensor.is_floating_point()}


Half = Literal["first", "second"]


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of one message of a site: its item, and its half of the item's exchange.

    Attributes:
        seq: number of the message, and of the server's answer.
        item: its item.
        half: "first", or "second" in a system with a head.
        settles: whether the answer is the last word on the item.
    """

    seq: int
    item: Item
    half: Half
    settles: bool


@dataclass(frozen=True)
class StreamSequence:
    """What a site's message number `seq` is: which item, and which half of its exchange.

    Without a head an item is one message: seq = q. With one it is two (smashed data, then the
    gradient at the head), and their order must not depend on timing. The second half of item q
    follows the first half of item q + lag, where lag is half the window:

        window 1 (lag 0)   F1 S1 F2 S2 F3 S3
        window 4 (lag 2)   F1 F2 F3 S1 F4 S2 F5 S3 ... S(last)

    so that an answer has half a window's time to arrive before it is needed.
    """

    plan: Plan
    has_head: bool

    @property
    def _lag(self) -> int:
        return min(self.plan.window // 2, self.plan.last - 1)

    @property
    def train(self) -> int:
        """Training samples of the site."""
        return self.plan.train

    @cached_property
    def last(self) -> int:
        """Number of the site's last message."""
        return 2 * self.plan.last if self.has_head else self.plan.last

    @property
    def answers(self) -> int:
        """Number of the server's last message, the farewell; the only one to a site that uploads once."""
        return 1 if self.plan.uploads_once else self.last + 1

    def slot(self, seq: int) -> Slot:
        """The place of message `seq`.

        Raises:
            Refused: 304 the site sends no such message.
        """
        if not 0 < seq <= self.last:
            raise mismatch(f"message {seq} has no place in a sequence of {self.last}.")
        return self._slots(seq)

    @cached_property
    def _slots(self) -> Callable[[int], Slot]:
        # A message is chosen by its place, and applied a moment later.
        return lru_cache(maxsize=8)(self._slot)

    def _slot(self, seq: int) -> Slot:
        q, half = self._at(seq)
        return Slot(seq, self.plan.item(q), half, settles=half == "second" or not self.has_head)

    def _at(self, seq: int) -> tuple[int, Half]:
        """Number of the item of message `seq`, and half."""
        if not self.has_head:
            return seq, "first"
        lag, items = self._lag, self.plan.last
        if seq <= lag:
            return seq, "first"
        if seq > 2 * items - lag:
            return seq - items, "second"
        pair, second = divmod(seq - lag - 1, 2)
        return (pair + 1, "second") if second else (pair + lag + 1, "first")

    def seq_of_first(self, q: int) -> int:
        """Number of the message that carries the first half of item q."""
        return q if not self.has_head or q <= self._lag else 2 * q - self._lag - 1

    def settles(self, q: int) -> int:
        """Number of the message whose answer is the last word on item q."""
        return min(2 * q + self._lag, self.plan.last + q) if self.has_head else q

    def place(self, seq: int) -> Place:
        """Where message `seq` stands among the messages of all sites; never decreases with seq."""
        slot = self.slot(seq)
        if slot.half == "second":  # it stands beside the first half that it follows
            slot = self.slot(self.seq_of_first(min(slot.item.number + self._lag, self.plan.last)))
        return slot.item.place
