"""The site's side of the Round shape: train, report what changed, go on with the model that comes back."""

from collections.abc import Mapping, Set
from typing import Any

import torch

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.engine.effects import Effect, Finish, Record, Send, Spend
from nightsplit.shared.errors import Refused, RunError, mismatch
from nightsplit.shared.learning.metrics import measure
from nightsplit.shared.protocols.build import WholeModel
from nightsplit.shared.protocols.report import NO_FIGURES, encode_report
from nightsplit.shared.protocols.rounds import LARGEST, RoundSequence, Work, check_size, check_slice, is_evaluated
from nightsplit.shared.storage.checkpoint import Snapshot, flatten, under
from nightsplit.shared.wire.message import SERVER, Header, Kind, Message
from nightsplit.site_worker.role import Account, SiteRole
from nightsplit.site_worker.rounds.batches import RoundBatches
from nightsplit.site_worker.rounds.trainer import Trainer, diverged


class RoundSite(SiteRole):
    """One batch of training at a time, so that a checkpoint may fall between any two.

    Args as of `SiteRole`; `account` is that of a run with differential privacy: every update is paid for before it
    leaves.
    """

    def __init__(
        self, name: str, config: RunConfig, model: WholeModel, trainer: Trainer, batches: RoundBatches,
        incarnation: str, account: Account | None = None,
    ) -> None:  # fmt: skip
        super().__init__(name, config, model.contract, incarnation)
        self.layout = layout = model.layout
        self.trainer = trainer
        self.batches = batches
        self.account = account
        self.work = Work.of(config, len(batches.train))
        self.sequence = RoundSequence.of(config, len(batches.train), layout)
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
        self._under_way: list[Any] = []
        """Kind and version of its first slice, hence of all."""
        self._unread = False
        """Whether the last model could not be used: the site went on with the one it had."""
        self._best: dict[str, torch.Tensor] = {}
        """The best model, once the server has told it."""

    @property
    def planned(self) -> int:
        """See `SiteRole`."""
        return self.sequence.last

    @property
    def samples(self) -> tuple[int, int, int]:
        """See `SiteRole`."""
        validation, test = map(len, self.batches.held_out.values())
        return len(self.batches.train), validation, test

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
            part = self._updates[update][self.layout.slice(number)]
            figures = self._figures[update] if number == self.layout.slices else NO_FIGURES
            return [self._send(Kind.UPDATE, self._versions[update], {"values": part}, figures)]
        if self.answered // self.layout.slices < self._made:
            return []  # the model that answers the last update is not here
        if self._made + 1 not in self._figures:
            self._figures[self._made + 1] = self._evaluate_if_due()
            return [self._worked()]
        if self._is_final:
            if self.next_seq > self._made * self.layout.slices + 1:
                return []  # the report is sent
            return [self._send(Kind.REPORT, self._version, self.report_tensors(), self._figures[self._made + 1])]
        if self.trained < update * self.work.batches:
            self._train()
        if self.trained == update * self.work.batches:
            self._updates[update] = self._changed()
            self._versions[update] = self._version
            self._made = update
            if self.account is not None:
                return [Spend(self.trained)]
        return [self._worked()]

    def answer(self, message: Message) -> list[Effect]:
        """See `SiteRole`."""
        header, scalars = message.header, message.scalars
        if not self._is_in_place(header):
            raise mismatch(f"{header.message_id} is out of turn.")
        best, judged, is_final = int(scalars["best"]), int(scalars["judged"]), bool(scalars.get("final", False))
        can_be = 0 <= best <= judged and self._judged <= judged <= self.candidates(header.version)
        if not can_be or (header.kind is Kind.MODEL and not self._may_be(header, is_final)):
            raise mismatch(f"{header.message_id} tells what cannot be of model {header.version}.")
        _, number = self.sequence.at(header.seq)
        values = check_slice(message, self.layout, number).clone()
        model = [*self._arriving, values]
        if header.kind is Kind.MODEL and not is_final and len(model) == self.layout.slices:
            self._expect_trainable(message, torch.cat(model))
        self.best = best
        return self._arrived(header, number, values, judged, is_final)

    def refused(self, header: Header, refusal: Refused) -> list[Effect]:
        """See `Role`: a model of which a slice cannot be used leaves the site's as it was."""
        if self._is_final or (header.kind is Kind.FINISH and self._unread):
            raise RunError(601, f"the end of the run cannot be read: {refusal.sentence}", refusal.remedy)
        _, number = self.sequence.at(header.seq)
        return self._arrived(header, number, None, self._judged, self._must_be_final(header))

    def candidates(self, version: int) -> int:
        """How many models can have been judged when the server has combined so often."""
        return version

    # -- inside ------------------------------------------------------------------------------------

    def _is_in_place(self, header: Header) -> bool:
        """Whether the plan has such a message here: a model answers an update, and the farewell a report.

        A site that could not read a model does not know whether it was the final one.
        """
        update, number = self.sequence.at(self.answered + 1)
        if header.kind is Kind.FINISH:
            expected = (self._is_final or self._unread) and header.version == self._version
            reply_to = 0
        else:
            expected = header.kind is Kind.MODEL and not self._is_final and update <= self._made
            reply_to = update * self.layout.slices
        whole = number == 1 or self._under_way == [header.kind.value, header.version]
        return expected and whole and (header.seq, header.reply_to) == (self.answered + 1, reply_to)

    def _may_be(self, header: Header, is_final: bool) -> bool:
        """Whether the model may have its version, and be final or not."""
        may_end = is_final and self.config.run.patience > 0
        return self._may_follow(header.version) and (may_end or is_final is self._must_be_final(header))

    def _may_follow(self, version: int) -> bool:
        return self._version + (self.config.round.close != "buffered") <= version <= self.config.round.rounds

    def _must_be_final(self, header: Header) -> bool:
        update, _ = self.sequence.at(self.answered + 1)
        return header.version == self.config.round.rounds or update == self.sequence.updates

    def _expect_trainable(self, message: Message, vector: torch.Tensor) -> None:
        """Refuse a model, float32 (length,), with bad statistics (307), or bad values for held-out samples (312)."""
        weights = self.layout.weights(vector)
        check_size(message, self.layout.vector(weights))
        size = self.config.run.batch_size
        inputs = torch.cat([dataset.inputs[:size] for dataset in self.batches.held_out.values()])
        if len(inputs) and not self.trainer.predict_with(weights, inputs).isfinite().all():
            remedy = f"{self.name} keeps the model it had; look at what the other sites send, or lower optimizer.lr."
            raise Refused(312, f"the model of {message.header.message_id} gives values that are not finite.", remedy)

    def _arrived(
        self, header: Header, number: int, values: torch.Tensor | None, judged: int, is_final: bool
    ) -> list[Effect]:
        """Keep a slice, None for one that was refused; with the last one the site goes on with the whole, if it is."""
        if number == 1:
            self._under_way = [header.kind.value, header.version]
        if values is not None:
            self._arriving.append(values)
        self.record_answer(header.seq, judged)
        if number < self.layout.slices:
            return []
        slices, self._arriving = self._arriving, []
        self._unread = len(slices) < self.layout.slices
        if header.kind is Kind.FINISH and not self._unread:
            self._best = self.layout.weights(torch.cat(slices))
            self.finished = True
            return [Finish()]
        if not self._unread:
            self.base = torch.cat(slices)
        if self._may_follow(header.version):
            self._version = header.version
        self._is_final = is_final
        self.trainer.load(self.layout.weights(self.base))
        return []

    def _train(self) -> None:
        k = self.trained
        inputs, targets = self.batches.batch(k)
        try:
            self.trainer.step(inputs, targets, self.batches.seed("trainer", k), self.batches.rate(k))
        except RunError as error:
            raise self._located(error) from None
        self.trained += 1

    def _changed(self) -> torch.Tensor:
        """The update, float32 (length,); RunError 603 where it cannot be sent."""
        change = self.layout.vector(self.trainer.weights()) - self.base
        if not change.abs().max() <= LARGEST:
            raise self._located(diverged(f"training changed a weight by more than {LARGEST:g}"))
        return change

    def _located(self, error: RunError) -> RunError:
        """The same error, with the model that the training began with: any site's update may have spoilt it."""
        if not self._version:
            return error
        sentence = f"{error.sentence} It began with the server's model {self._version}."
        spoilt = 'another site\'s update has spoilt that model: round.combine = "median" withstands one.'
        return RunError(error.number, sentence, f"{error.remedy} If all is well here, {spoilt}")

    def judge(self) -> str:
        """Figures of the present model for the site's held-out patients; none where it is not the server's."""
        if self._unread:
            return NO_FIGURES
        figures = {}
        for part, dataset in self.batches.held_out.items():
            if len(dataset):
                outputs, targets = self.trainer.predict(dataset.inputs), self.batches.targets(dataset)
                figures[part.value] = measure(self.config.task, self.config.data, outputs, targets, dataset.patients)
        return encode_report(self.config.task, figures)

    def judge_final(self) -> str:
        """Figures for the report."""
        return self.judge()

    def report_tensors(self) -> Mapping[str, torch.Tensor]:
        """What goes with the report."""
        return {}

    def _evaluate_if_due(self) -> str:
        if self._is_final:
            return self.judge_final()
        return self.judge() if is_evaluated(self.config, self._version) else NO_FIGURES

    def _worked(self) -> Record:
        return Record({"event": "local", "step": self.trained})

    def _send(self, kind: Kind, version: int, tensors: Mapping[str, torch.Tensor], figures: str) -> Send:
        self.next_seq += 1
        return Send(SERVER, kind, self.next_seq - 1, version=version, tensors=tensors, scalars={"metrics": figures})

    # -- snapshot ----------------------------------------------------------------------------------

    def snapshot(self, first_unconfirmed: int | None) -> Snapshot:
        """See `Role`."""
        base = super().snapshot(first_unconfirmed)
        oldest, _ = self.sequence.at(base.facts["next"])
        for kept in (self._updates, self._versions, self._figures):
            for update in [update for update in kept if update < oldest]:
                del kept[update]
        tensors = {
            **base.tensors, **self.trainer.state(), "base": self.base, **flatten("update", self._updates),
            **flatten("arriving", dict(enumerate(self._arriving))), **flatten("best", self._best),
        }  # fmt: skip
        facts: dict[str, Any] = {
            "trained": self.trained, "version": self._version, "is_final": self._is_final, "made": self._made,
            "figures": {**self._figures}, "versions": {**self._versions}, "arriving": len(self._arriving),
            "under_way": self._under_way, "unread": self._unread,
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
        self._made, self._under_way, self._unread = facts["made"], facts["under_way"], facts["unread"]
        self._figures = {int(update): text for update, text in facts["figures"].items()}
        self._versions = {int(update): version for update, version in facts["versions"].items()}
