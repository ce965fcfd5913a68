"""The contract of the Stream systems: what their messages carry, and in which order a site sends.

split_labels   site: Smashed + targets         server: CutGradient
split_frozen   site: Smashed + targets, once   server: nothing
split_u        site: Smashed, HeadGradient     server: HeadInput, CutGradient

Every message of a site but split_frozen's has exactly one answer, so that the server's sequence to
a site runs in step with the site's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import nn

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.errors import Refused
from nightsplit.shared.protocols.handshake import AGREEMENT, VERDICT
from nightsplit.shared.protocols.plan import Place, Plan
from nightsplit.shared.wire.message import Kind, Message
from nightsplit.shared.wire.schema import Payload, TensorSpec


def payloads(
    config: RunConfig, cut: tuple[int, ...], head: tuple[int, ...] | None, bottom: nn.Module, top: nn.Module
) -> Mapping[Kind, Payload]:
    """The contract of every kind of message in a run.

    Args:
        config: the run.
        cut: shape of one sample's activations at the cut.
        head: shape of one sample's activations at the head's input; None without a head.
        bottom, top: modules whose weights may travel (averaged bottoms, an exported top).
    """
    wire = config.wire

    def activations(shape: tuple[int, ...]) -> TensorSpec:
        return TensorSpec(torch.float32, ("batch", *shape), wire.smashed, wire.zstd)

    def gradient(shape: tuple[int, ...]) -> Payload:
        spec = TensorSpec(torch.float32, ("batch", *shape), wire.gradient, wire.zstd)
        return Payload({"gradient": spec})

    def answer(payload: Payload) -> Payload:
        return Payload(payload.tensors, {**payload.scalars, **VERDICT})

    smashed = {"smashed": activations(cut)}
    if head is None:
        targets = torch.int64 if config.task.kind == "multiclass" else torch.float32
        smashed["targets"] = TensorSpec(targets, ("batch",))
    contract = {
        **AGREEMENT,
        Kind.SMASHED: Payload(smashed),
        Kind.CUT_GRADIENT: answer(gradient(cut)),
        Kind.BOTTOM: Payload(weights_spec(bottom)),
        Kind.AVERAGE: answer(Payload(weights_spec(bottom))),
        Kind.NOTED: answer(Payload()),
        Kind.REFUSED: answer(Payload(scalars={"number": int, "reason": str})),
        Kind.FINISH: answer(Payload(weights_spec(top) if config.run.export_top else {}, {"summary": str})),
    }  # fmt: skip
    if head is not None:
        contract[Kind.HEAD_INPUT] = answer(Payload({"activations": activations(head)}))
        contract[Kind.HEAD_GRADIENT] = gradient(head)
        contract[Kind.REPORT] = Payload(scalars={"metrics": str})
    return contract


def weights_spec(module: nn.Module) -> dict[str, TensorSpec]:
    """A spec for each parameter and floating-point buffer, as they are, at full precision."""
    return {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in weights(module).items()}


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and floating-point buffers by name; counters (integer buffers) stay where they are."""
    return {name: tensor for name, tensor in module.state_dict().items() if tensor.is_floating_point()}


Half = Literal["first", "second"]


@dataclass(frozen=True)
class UpSequence:
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

    def at(self, seq: int) -> tuple[int, Half]:
        """Item and half of message `seq`, 1 <= seq <= last."""
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

    def seq_of_second(self, q: int) -> int:
        """Number of the message that carries the second half of item q (with a head)."""
        return min(2 * q + self._lag, self.plan.last + q)

    def settles(self, q: int) -> int:
        """Number of the message whose answer is the last word on item q."""
        return self.seq_of_second(q) if self.has_head else q

    def place(self, seq: int) -> tuple[Place, int]:
        """Where message `seq` stands among the messages of all sites; never decreases with seq."""
        q, half = self.at(seq)
        beside = min(q + self._lag, self.plan.last) if half == "second" else q
        return self.plan.place(beside), seq


def check_rows(message: Message, plan: Plan, q: int) -> None:
    """A payload of a batch has as many rows as the plan gives item q.

    Raises:
        Refused: 306 it has not.
    """
    expected = len(plan.rows(q))
    for name in ("smashed", "gradient", "activations"):
        tensor = message.tensors.get(name)
        if tensor is not None and len(tensor) != expected:
            raise Refused(
                306,
                f"{name} of {message.header.message_id} has {len(tensor)} rows, item {q} has {expected}.",
                "run the same version of nightsplit at both sides.",
            )
