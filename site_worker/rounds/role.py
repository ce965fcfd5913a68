"""The site's side of the Round shape: train, report what changed, go on with the model that comes back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from typing import Any

import torch

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.engine.effects import Effect, Finish, Record, Send, Spend
from nightsplit.shared.errors import Refused, RunError
from nightsplit.shared.learning.metrics import measure
from nightsplit.shared.protocols.build import Rounds
from nightsplit.shared.protocols.rounds import RoundSequence, Work, check_slice, is_judged
from nightsplit.shared.storage.checkpoint import Snapshot, flatten, under
from nightsplit.shared.wire.message import SERVER, Header, Kind, Message
from nightsplit.site_worker.role import Account, SiteRole
from nightsplit.site_worker.rounds.batches import RoundFeed
from nightsplit.site_worker.rounds.trainer import Trainer


class RoundSite(SiteRole):
    """One batch of training at a time, so that a checkpoint may fall between any two.

    Args:
        name: the site.
        config: the run, as the site's own run.toml has it.
        rounds: layout and contract.
        trainer: the whole model.
        feed: the site's batches.
        incarnation: as in `SiteRole`.
        account: of a run with differential privacy: every update is paid for before it leaves.
    """

    def __init__(
        self, name: str, config: RunConfig, rounds: Rounds, trainer: Trainer, feed: RoundFeed, incarnation: str,
        account: Account | None = None,
    ) -> None:  # fmt: skip
        super().__init__(name, config, rounds.contract, incarnation)
        self.layout = layout = rounds.layout
        self.trainer = trainer
        self.feed = feed
        self.account = account
        self.work = Work.of(config, len(feed.train))
        self.sequence = RoundSequence(len(feed.train), config.round.rounds, layout.slices)
        self.trained = 0
        """Training batches so far, over all rounds."""
        self.base = layout.vector(trainer.weights())
        """The model that the present update began with, float32 (length,)."""
        self.published = self.base
        """The model that the run began with."""
        self._version = 0
        """Its version."""
        self._is_final = False
        self._figures: dict[int, str] = {}
        """Figures of held-out patients, by the update that carries them; the report's come behind the last."""
        self._made = 0
        """Updates that are complete; the next one is being trained, or waits for its model."""
        self._updates: dict[int, torch.Tensor] = {}
        """Updates whose messages are not all confirmed yet."""
        self._versions: dict[int, int] = {}
        """Version of the model that each of them began with."""
        self._arriving: list[torch.Tensor] = []
        """Slices of the model, or of the farewell, that is under way."""
        self._best: dict[str, torch.Tensor] = {}
        """The best model, once the server has told it."""

    @property
    def planned(self) -> int:
        """See `SiteRole`."""
        return self.sequence.last

    @property
    def samples(self) -> tuple[int, int, int]:
        """See `SiteRole`."""
        return self.feed.samples

    def model(self) -> dict[str, dict[str, torch.Tensor]]:
        """See `SiteRole`: the whole model but for counters; what does not travel is the site's own."""
        own = {name: tensor for name, tensor in self.trainer.weights().items() if tensor.is_floating_point()}
        return {"model": {**own, **self._best}}

    # -- Role ------------------------------------------------------------------------------------

    def choose(self, ready: Set[str]) -> str | None:
        """See `Role`: after a crash a model may be here before the update that it answers is made again."""
        update, _ = self.sequence.at(self.answered + 1)
        return super().choose(ready) if update <= self._made + self._is_final else None

    def next(self) -> list[Effect]:
        """Send what is ready; else judge the model, or train one batch."""
        if not self.at_work:
            return []
        update, number = self.sequence.at(self.next_seq)
        if update <= self._made:
            return [self._send_update(update, number)]
        if self.answered // self.layout.slices < self._made:
            return []  # the model that answers the last update is not here
        if self._made + 1 not in self._figures:
            self._figures[self._made + 1] = self._judge_if_due()
            return [self._worked()]
        if self._is_final:
            report_is_sent = self.next_seq > self._made * self.layout.slices + 1
            return [] if report_is_sent else [self._send_report()]
        if self.trained < update * self.work.batches:
            self._train()
        if self.trained == update * self.work.batches:
            self._updates[update] = self.layout.vector(self.trainer.weights()) - self.base
            self._versions[update] = self._version
            self._made = update
            if self.account is not None:
                return [Spend(self.trained)]
        return [self._worked()]

    def answer(self, message: Message) -> list[Effect]:
        """See `SiteRole`."""
        header, scalars = message.header, message.scalars
        update, number = self.sequence.at(header.seq)
        if header.kind not in (Kind.MODEL, Kind.FINISH) or update > self._made + 1:
            raise Refused(304, f"{header.message_id} is out of turn.", "run the same version at both sides.")
        values = check_slice(message, self.layout, number).clone()
        self.best = int(scalars["best"])
        return self._arrived(header, number, values, int(scalars["judged"]), bool(scalars.get("final", False)))

    def refused(self, header: Header, refusal: Refused) -> list[Effect]:
        """See `Role`: a slice of a model that cannot be used leaves the site's as it was."""
        if header.kind is Kind.FINISH or self._is_final:
            raise RunError(601, f"the end of the run cannot be read: {refusal.sentence}", refusal.remedy)
        _, number = self.sequence.at(header.seq)
        return self._arrived(header, number, self.base[self.layout.slice(number)], 0, is_final=False)

    # -- inside ------------------------------------------------------------------------------------

    def _arrived(self, header: Header, number: int, values: torch.Tensor, judged: int, is_final: bool) -> list[Effect]:
        self._arriving.append(values)
        self.heard(header.seq, judged)
        if number < self.layout.slices:
            return []
        vector, self._arriving = torch.cat(self._arriving), []
        if header.kind is Kind.FINISH:
            self._best = self.layout.weights(vector)
            self.finished = True
            return [Finish()]
        self.base, self._version, self._is_final = vector, header.version, is_final
        self.trainer.load(self.layout.weights(vector))
        return []

    def _train(self) -> None:
        k = self.trained
        inputs, targets = self.feed.batch(k)
        self.trainer.step(inputs, targets, self.feed.seed("trainer", k), self.feed.rate(k))
        self.trained += 1

    def judge(self) -> str:
        """Figures of the present model for the site's held-out patients, as JSON."""
        figures = {
            part.value: measure(
                self.config.task, self.config.data, self.trainer.predict(dataset.inputs),
                self.feed.targets(dataset), dataset.patients,
            )
            for part, dataset in self.feed.held_out.items()
            if len(dataset)
        }  # fmt: skip
        return json.dumps(figures, sort_keys=True)

    def judge_final(self) -> str:
        """Figures for the report."""
        return self.judge()

    def report_tensors(self) -> Mapping[str, torch.Tensor]:
        """What goes with the report."""
        return {}

    def _judge_if_due(self) -> str:
        if self._is_final:
            return self.judge_final()
        return self.judge() if is_judged(self.config, self._version) else "{}"

    def _worked(self) -> Record:
        return Record({"event": "local", "step": self.trained})

    def _send_update(self, update: int, number: int) -> Send:
        send = Send(
            SERVER, Kind.UPDATE, self.next_seq, version=self._versions[update],
            tensors={"values": self._updates[update][self.layout.slice(number)]},
            scalars={"metrics": self._figures[update] if number == self.layout.slices else "{}"},
        )  # fmt: skip
        self.next_seq += 1
        return send

    def _send_report(self) -> Send:
        scalars = {"metrics": self._figures[self._made + 1]}
        send = Send(
            SERVER, Kind.REPORT, self.next_seq, version=self._version, tensors=self.report_tensors(), scalars=scalars
        )
        self.next_seq += 1
        return send

    # -- snapshot ----------------------------------------------------------------------------------

    def snapshot(self, first_unconfirmed: int | None) -> Snapshot:
        """See `Role`."""
        base = super().snapshot(first_unconfirmed)
        oldest, _ = self.sequence.at(base.facts["next"])
        for kept in (self._updates, self._versions, self._figures):
            for update in [update for update in kept if update < oldest]:
                del kept[update]
        tensors = {
            **base.tensors, **self.trainer.state(), "base": self.base,
            **dict(flatten("update", {str(update): tensor for update, tensor in self._updates.items()})),
            **dict(flatten("arriving", {str(n): tensor for n, tensor in enumerate(self._arriving)})),
            **dict(flatten("best", self._best)),
        }  # fmt: skip
        facts: dict[str, Any] = {
            "trained": self.trained, "version": self._version, "is_final": self._is_final, "made": self._made,
            "figures": {str(update): text for update, text in self._figures.items()},
            "versions": {str(update): version for update, version in self._versions.items()},
            "arriving": len(self._arriving),
        }  # fmt: skip
        return Snapshot(tensors, {**base.facts, **facts})

    def restore(self, snapshot: Snapshot) -> None:
        """See `Role`."""
        super().restore(snapshot)
        tensors, facts = snapshot.tensors, snapshot.facts
        self.trainer.restore(tensors)
        self.base, self._best = tensors["base"], under("best", tensors)
        self._updates = {int(update): tensor for update, tensor in under("update", tensors).items()}
        self._arriving = [tensors[f"arriving/{n}"] for n in range(facts["arriving"])]
        self.trained, self._version, self._is_final = facts["trained"], facts["version"], facts["is_final"]
        self._made = facts["made"]
        self._figures = {int(update): text for update, text in facts["figures"].items()}
        self._versions = {int(update): version for update, version in facts["versions"].items()}
