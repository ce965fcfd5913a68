"""The site's side of the Stream shape: what is sent when, and what becomes of the answers."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch

from shared.checkpoint import Snapshot, flatten, under
from shared.config import RunConfig
from shared.contract import Payload
from shared.effects import Effect, Finish, Send
from shared.errors import TITLES, Refused, RunError
from shared.message import SERVER, Header, Kind, Message
from shared.protocols.plan import Item, Step
from shared.protocols.stream import ANY, UpSequence, check_contract, check_rows, weights
from shared.roles import Role
from shared.tensors import is_finite
from site_worker.bottom import Bottom
from site_worker.feed import Feed


class StreamSite(Role):
    """Sends its plan item by item, as far ahead of the answers as the window allows.

    Args:
        name: the site.
        config: the run, as the site's own run.toml has it.
        bottom: the site's layers.
        feed: the site's batches.
        contract: payload of each kind (`shared.protocols.stream.payloads`).
        incarnation: of this process; a rejection of an earlier one is ignored.
    """

    rederives = True

    def __init__(
        self,
        name: str,
        config: RunConfig,
        bottom: Bottom,
        feed: Feed,
        contract: Mapping[Kind, Payload],
        incarnation: str,
    ) -> None:
        super().__init__(name)
        self.config = config
        self.bottom = bottom
        self.feed = feed
        self.sequence = UpSequence(feed.plan, has_head=Kind.HEAD_INPUT in contract)
        self.next_seq = 1
        """The next message to send."""
        self.answered = 0
        """Answers applied; the last one answered message number `answered`."""
        self.finished = False
        self.best = 0
        """The best epoch, as far as the server has told."""
        self._judged = 0
        """The last epoch that the server has judged, as far as it has told."""
        self.exported_top: dict[str, torch.Tensor] = {}
        """The server's half of the best model, where the run exports it."""
        self._contract = contract
        self._incarnation = incarnation
        self._enrolled = False
        self._released = 0
        """Answers that the broker may have forgotten: a state that holds fewer was lost."""
        self._in_snapshot = 0
        self._candidates: dict[int, dict[str, torch.Tensor]] = {}
        """The bottom that each epoch was evaluated with, while that epoch may still be the best."""

    # -- what a system fills in ------------------------------------------------------------------

    @abstractmethod
    def content(self, q: int, item: Item) -> Send:
        """The message that carries the first half of item q."""

    def second(self, q: int, item: Item) -> Send:
        """The message that carries the second half of item q, in a system with a head."""
        raise NotImplementedError

    @abstractmethod
    def take(self, q: int, item: Item, message: Message) -> None:
        """Apply an answer about item q that carries tensors."""

    # -- Role ------------------------------------------------------------------------------------

    def payload(self, kind: Kind) -> Payload | None:
        """See `Role`."""
        return self._contract.get(kind)

    def start(self) -> list[Effect]:
        """Say hello. To a site that has not seen the run's manifest, the server answers with it."""
        return [Finish()] if self.finished else [self._hello()]

    def next(self) -> list[Effect]:
        """The next message of the plan, when the answers that it depends on are here."""
        if not self._enrolled or self.finished or self.next_seq > self.sequence.last:
            return []
        q, half = self.sequence.at(self.next_seq)
        if self.answered < self._needs(q, half == "second"):
            return []
        item = self.feed.plan.item(q)
        if half == "second":
            send = self.second(q, item)
        elif item.step is Step.AVERAGE:
            bottom = self.bottom.weights(self.feed.plan.version_of(q))
            send = self.send(q, Kind.BOTTOM, {name: bottom[name].cpu() for name in weights(self.bottom.module)})
        else:
            send = self.content(q, item)
        self.next_seq += 1
        return [send]

    def on(self, message: Message) -> list[Effect]:
        """See `Role`."""
        kind, scalars = message.header.kind, message.scalars
        if kind is Kind.MANIFEST:
            return self._enrol(str(scalars["config"]), str(scalars["contract"]))
        if kind is Kind.REJECTED:
            if scalars["incarnation"] not in (ANY, self._incarnation):
                return []
            number, reason = int(scalars["number"]), str(scalars["reason"])
            if number not in TITLES:
                raise Refused(
                    304, f"it rejects with number {number}.", "run the same version of nightsplit at both sides."
                )
            raise RunError(number, f"the server rejects {self.name}: {reason}.", "see the page of this number.")
        if kind is not Kind.FINISH and message.header.seq > self.sequence.last:
            raise Refused(
                304,
                f"{message.header.message_id} answers nothing.",
                "run the same version of nightsplit at both sides.",
            )
        if kind is Kind.FINISH:
            self.best = int(scalars["best"])
            return self._finish(message)
        seq = message.header.seq
        q, _ = self.sequence.at(seq)
        check_rows(message, self.feed.plan, q)
        self.best = int(scalars["best"])
        item = self.feed.plan.item(q)
        if kind is Kind.AVERAGE:
            self.bottom.merge(self.feed.plan.version_of(q), message.tensors)
        elif kind in (Kind.NOTED, Kind.REFUSED):
            if seq == self.sequence.settles(q):
                self.bottom.pass_over(q)
        else:
            self.take(q, item, message)
        self._answer_applied(message.header, int(scalars["judged"]))
        return []

    def refused(self, header: Header, refusal: Refused) -> list[Effect]:
        """See `Role`: an answer that cannot be used counts as one without a gradient."""
        if header.kind is Kind.FINISH:
            raise RunError(601, f"the end of the run cannot be read: {refusal.sentence}", refusal.remedy)
        if header.seq <= self.sequence.last:
            q, _ = self.sequence.at(header.seq)
            if header.seq == self.sequence.settles(q):
                self.bottom.pass_over(q)
        self._answer_applied(header, 0)
        return []

    # -- parts that systems use --------------------------------------------------------------------

    def send(self, q: int, kind: Kind, tensors: Mapping[str, torch.Tensor], **scalars: str) -> Send:
        """A message about item q, as the next in the sequence."""
        return Send(SERVER, kind, self.next_seq, version=self.feed.plan.version_of(q), tensors=tensors, scalars=scalars)

    def forward(self, q: int, item: Item) -> torch.Tensor:
        """Smashed data (batch, *cut) of item q, by the version that its place in the plan fixes."""
        version = self.feed.plan.version_of(q)
        training = item.step is Step.TRAIN and self.config.run.protocol != "split_frozen"
        smashed = self.bottom.forward(q, version, self.feed.inputs(q), self.feed.seed("bottom", q), training)
        if not is_finite(smashed):
            raise RunError(
                603,
                f"the activations of item {q} are not finite.",
                "lower optimizer.lr in a new run, or check the data.",
            )
        return smashed

    def learn(self, q: int, gradient: torch.Tensor) -> None:
        """Apply the gradient (batch, *cut) that answers training item q."""
        inputs, seed = self.feed.inputs(q), self.feed.seed("bottom", q)
        self.bottom.learn(q, self.feed.plan.version_of(q), inputs, seed, gradient)

    def open_candidate(self, epoch: int) -> bool:
        """Whether an epoch is the best, or may still turn out to be."""
        return epoch > self._judged or epoch == self.best

    def final_bottom(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers of the bottom that belongs to the best model."""
        return self._candidates.get(self.best, self.bottom.weights(self.bottom.version))

    # -- inside ------------------------------------------------------------------------------------

    def _needs(self, q: int, second: bool) -> int:
        """Number of the answer without which item q's message cannot be made."""
        if second:
            return self.sequence.seq_of_first(q)
        behind = q - self.feed.plan.window
        return self.sequence.settles(behind) if behind >= 1 else 0

    def _oldest_item(self, seq: int) -> int:
        """The lowest item that message `seq` or a later one is about."""
        following = range(seq, min(seq + 2, self.sequence.last + 1))
        return min(self.sequence.at(number)[0] for number in following)

    def _answer_applied(self, header: Header, judged: int) -> None:
        self.answered, self._judged = header.seq, max(judged, self._judged)
        if header.seq <= self.sequence.last:
            # Not when it is sent: after a crash the answer may be here before it would be sent again.
            q, _ = self.sequence.at(header.seq)
            item = self.feed.plan.item(q)
            if item.evaluates and item.epoch not in self._candidates:
                self._candidates[item.epoch] = self.bottom.weights(self.feed.plan.version_of(q))
        self._candidates = {epoch: kept for epoch, kept in self._candidates.items() if self.open_candidate(epoch)}

    def _enrol(self, config: str, contract: str) -> list[Effect]:
        """Agree to the run as the server opened it, before anything of a patient is sent."""
        if contract != self.config.contract:
            differences = _difference(config, self.config.canonical())
            raise RunError(
                601,
                f"{self.name} and the server have different run.toml files: {differences}.",
                "agree on one run.toml. Nothing of a patient was sent.",
            )
        if self._enrolled:
            return []
        self._enrolled = True
        return [self._hello()]

    def _hello(self) -> Send:
        plan = self.feed.plan
        # Not even the numbers of patients' samples leave before site and server agree on the run.
        counts = (plan.train, plan.validation, plan.test) if self._enrolled else (0, 0, 0)
        return Send(
            SERVER,
            Kind.HELLO,
            0,
            scalars={
                "incarnation": self._incarnation, "contract": self.config.contract,
                "enrolled": self._enrolled, "train": counts[0], "validation": counts[1], "test": counts[2],
                "mark": self.answered, "released": self._released,
            },
        )  # fmt: skip

    def _finish(self, message: Message) -> list[Effect]:
        self.finished = True
        self.exported_top = {name: tensor.clone() for name, tensor in message.tensors.items()}
        return [Finish()]

    def snapshot(self, first_unconfirmed: int | None) -> Snapshot:
        """See `Role`. What no later snapshot can need is forgotten here."""
        resume = min(first_unconfirmed or self.next_seq, self.next_seq)
        self._in_snapshot = self.answered
        oldest = min(resume, self.answered + 1)
        if oldest <= self.sequence.last:
            self.bottom.forget(below=self.feed.plan.version_of(self._oldest_item(oldest)))
        tensors = self.bottom.state()
        for epoch, kept in self._candidates.items():
            tensors.update(flatten(f"candidate/{epoch}", kept))
        tensors.update(flatten("exported_top", self.exported_top))
        facts: dict[str, Any] = {
            "contract": self.config.contract,
            "next": resume, "answered": self.answered, "finished": self.finished, "enrolled": self._enrolled,
            "best": self.best, "judged": self._judged, "candidates": list(self._candidates), "released": self._released,
        }  # fmt: skip
        return Snapshot(tensors, facts)

    def saved(self) -> list[Effect]:
        """See `Role`: before the broker forgets its first answer, the server hears that it may."""
        if self._released or not self._in_snapshot:
            return []
        self._released = self._in_snapshot
        return [self._hello()]

    def restore(self, snapshot: Snapshot) -> None:
        """See `Role`."""
        tensors, facts = snapshot.tensors, snapshot.facts
        check_contract(facts["contract"], self.config, self.name)
        self.bottom.restore(tensors)
        self.next_seq, self.answered = facts["next"], facts["answered"]
        self.best, self._judged = facts["best"], facts["judged"]
        self.finished, self._enrolled, self._released = facts["finished"], facts["enrolled"], facts["released"]
        self._candidates = {epoch: under(f"candidate/{epoch}", tensors) for epoch in facts["candidates"]}
        self.exported_top = under("exported_top", tensors)


def _difference(theirs: str, ours: str) -> str:
    """Keys in which two canonical configurations differ."""

    def lines(text: str) -> dict[str, None]:
        content = json.loads(text)
        return dict.fromkeys(f"{s}.{k} = {v!r:.80}" for s, keys in content.items() for k, v in keys.items())

    try:
        server, here = lines(theirs), lines(ours)
    except (ValueError, AttributeError, RecursionError):
        return "the server's cannot be read here"
    changed = [f"server {line}" for line in server if line not in here]
    changed += [f"here {line}" for line in here if line not in server]
    return "; ".join(sorted(changed, key=lambda line: line.partition(" ")[2])[:6])
