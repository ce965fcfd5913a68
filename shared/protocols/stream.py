"""Stream shape: payloads of its messages, and the order in which a site sends them.

split_labels   site: Smashed + targets         server: CutGradient
split_frozen   site: Smashed + targets, once   server: nothing
split_u        site: Smashed, HeadGradient     server: HeadInput, CutGradient

Every message of a site has exactly one answer (split_frozen: none), so that the server's messages
to a site are numbered like the site's own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Literal

import torch
from torch import nn

from nightsplit.shared.config.run import RoundSection, RunConfig
from nightsplit.shared.config.section import KeyConflictError
from nightsplit.shared.errors import mismatch
from nightsplit.shared.protocols.handshake import PROGRESS, REFUSAL
from nightsplit.shared.protocols.plan import Item, Place, Plan
from nightsplit.shared.protocols.spec import Names, ProtocolSpec, Shape, Shapes, systems
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
    """Raise `KeyConflictError` if run.toml has settings that no protocol of this shape supports."""
    protocol, rounds = config.run.protocol, ", ".join(systems(Shape.ROUND))
    if config.round != RoundSection():
        remedy = "remove [round], or choose another run.protocol."
        raise KeyConflictError("round", f"{protocol} exchanges no weights", remedy)
    if config.privacy is not None:
        raise KeyConflictError("privacy", f"{protocol} trains without noise", f"choose one of {rounds}.")
    if config.model.initial is not None:
        raise KeyConflictError("model.initial", f"{protocol} begins with fresh weights", "remove it.")
    if config.task.kind == "segmentation":
        raise KeyConflictError("task.kind", f"{protocol} cannot segment", f"choose one of {rounds}.")


protocol = partial(ProtocolSpec, shape=Shape.STREAM, settings=settings, names=NAMES)
"""Specification of a protocol of this shape."""


def activations(config: RunConfig, shapes: Shapes, stored: bool = False) -> TensorSpec:
    """Return the spec of smashed data (batch, *cut); a server with a tape stores them, too."""
    reveals = Reveals.STORED_ACTIVATIONS if stored or config.run.tape else Reveals.ACTIVATIONS
    return TensorSpec(torch.float32, ("batch", *shapes.cut), config.wire.smashed, config.wire.zstd, reveals)


def targets(config: RunConfig) -> TensorSpec:
    """Return the spec of the labels (batch,) of smashed data."""
    dtype = torch.int64 if config.task.kind == "multiclass" else torch.float32
    return TensorSpec(dtype, ("batch",), reveals=Reveals.LABELS)


def gradient(config: RunConfig, shape: tuple[int, ...], reveals: Reveals | None = None) -> dict[str, TensorSpec]:
    """Return the spec of a gradient (batch, *shape)."""
    wire = config.wire
    return {"gradient": TensorSpec(torch.float32, ("batch", *shape), wire.gradient, wire.zstd, reveals)}


def displacement(config: RunConfig, shape: tuple[int, ...], reveals: Reveals | None = None) -> dict[str, TensorSpec]:
    """Return the spec of a displacement (batch, *shape), in the codec of gradients."""
    return {"displacement": gradient(config, shape, reveals)["gradient"]}


def answers(config: RunConfig, shapes: Shapes) -> list[Payload]:
    """Return the payloads of a server's answers with a trained bottom, and of averaging if the run has it."""
    if config.run.learning == "targets":
        late = Payload(Kind.CUT_TARGET, displacement(config, shapes.cut), PROGRESS)
    else:
        late = Payload(Kind.CUT_GRADIENT, gradient(config, shapes.cut), PROGRESS)
    payloads = [
        late,
        Payload(Kind.NOTED, scalars=PROGRESS),
        Payload(Kind.REFUSED, scalars={**REFUSAL, **PROGRESS}),
    ]
    if config.run.bottoms == "averaged":
        payloads.append(Payload(Kind.BOTTOM, weights_spec(shapes.bottom, Reveals.WEIGHTS)))
        payloads.append(Payload(Kind.AVERAGE, weights_spec(shapes.bottom), PROGRESS, sets_weights=True))
    return payloads


def finish(config: RunConfig, shapes: Shapes) -> Payload:
    """Return the payload of the server's last message: summary of the run, and the top if the run exports it."""
    top = weights_spec(shapes.top) if config.run.export_top else {}
    return Payload(Kind.FINISH, top, {"summary": ScalarSpec(str), **PROGRESS})


def weights_spec(weights: Mapping[str, torch.Tensor], reveals: Reveals | None = None) -> dict[str, TensorSpec]:
    """Return a spec for each of these weights, at full precision."""
    return {name: TensorSpec(t.dtype, tuple(t.shape), reveals=reveals) for name, t in weights.items()}


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and floating-point buffers by name, without counters (integer buffers)."""
    return {name: tensor for name, tensor in module.state_dict().items() if tensor.is_floating_point()}


Half = Literal["first", "second"]


@dataclass(frozen=True, slots=True)
class Slot:
    """Position of one message of a site: its item, and its half of the item's exchange.

    Attributes:
        seq: number of the message, and of the server's answer.
        half: "first", or "second" in a protocol with a head.
        completes_item: whether the answer completes the item.
    """

    seq: int
    item: Item
    half: Half
    completes_item: bool


@dataclass(frozen=True)
class StreamSequence:
    """Sequence of a site's messages: the item of each, and the half of its exchange.

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
        """Number of training samples of the site."""
        return self.plan.train

    @cached_property
    def last(self) -> int:
        """Number of the site's last message."""
        return 2 * self.plan.last if self.has_head else self.plan.last

    @property
    def last_answer(self) -> int:
        """Number of the server's last message, the farewell; 1 for a site that uploads once."""
        return 1 if self.plan.uploads_once else self.last + 1

    def slot(self, seq: int) -> Slot:
        """Return the position of message `seq`; Refused 304 if the site sends no such message."""
        if not 0 < seq <= self.last:
            raise mismatch(f"message {seq} is outside a sequence of {self.last}.")
        return self._slots(seq)

    @cached_property
    def _slots(self) -> Callable[[int], Slot]:
        # Cached, since a message is chosen by its slot and applied a moment later.
        return lru_cache(maxsize=8)(self._slot)

    def _slot(self, seq: int) -> Slot:
        q, half = self._at(seq)
        return Slot(seq, self.plan.item(q), half, completes_item=half == "second" or not self.has_head)

    def _at(self, seq: int) -> tuple[int, Half]:
        """Return the item's number and the half of message `seq`."""
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
        """Return the number of the message with the first half of item q."""
        return q if not self.has_head or q <= self._lag else 2 * q - self._lag - 1

    def completing_seq(self, q: int) -> int:
        """Return the number of the message with the answer that completes item q."""
        return min(2 * q + self._lag, self.plan.last + q) if self.has_head else q

    def place(self, seq: int) -> Place:
        """Return the place of message `seq` among the messages of all sites; it never decreases with seq."""
        slot = self.slot(seq)
        if slot.half == "second":  # at the place of the first half that it follows
            slot = self.slot(self.seq_of_first(min(slot.item.number + self._lag, self.plan.last)))
        return slot.item.place
