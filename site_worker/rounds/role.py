"""The site's side of the Round shape: train, send the update, go on with the server's next model."""

from collections.abc import Mapping, Set
from typing import Any

import torch
from typing_extensions import override

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.engine.effects import Effect, Finish, Record, Send, Spend
from nightsplit.shared.errors import Refused, RunError, mismatch
from nightsplit.shared.learning.metrics import measure
from nightsplit.shared.protocols.build import WholeModel
from nightsplit.shared.protocols.report import NO_FIGURES, encode_report
from nightsplit.shared.protocols.rounds import VALUE_MAX, RoundSequence, Work, check_size, check_slice, is_evaluated
from nightsplit.shared.storage.checkpoint import Snapshot, flatten, under
from nightsplit.shared.wire.message import SERVER, Header, Kind, Message
from nightsplit.site_worker.role import Account, SiteRole
from nightsplit.site_worker.rounds.batches import RoundBatches
from nightsplit.site_worker.rounds.trainer import Trainer, divergence_error


class RoundSite(SiteRole):
    """Role that trains one batch at a time, so that a checkpoint is possible after each.

    In a run with differential privacy it has an account, from which every update is paid before it leaves.
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
        self.sequence: RoundSequence = RoundSequence.of(config, len(batches.train), layout)
        self.step = 0
        """Training steps so far, over all rounds."""
        self.base = layout.vector(trainer.weights())
        """Model at the start of the current update, float32 (length,)."""
        self.published = self.base
        """Model at the start of the run."""
        self._version = 0
        """Version of `base`."""
        self._is_final = False
        self._metrics: dict[int, str] = {}
        """Metrics of held-out patients, by the update that carries them; those of the report by the next number."""
        self._last_update = 0
        """Number of the last complete update; the next one is in training, or waits for its model."""
        self._updates: dict[int, torch.Tensor] = {}
        """Updates with messages that are unconfirmed or unanswered."""
        self._versions: dict[int, int] = {}
        """Version of the model that each of them began with."""
        self._slices: list[torch.Tensor] = []
        """Slices so far of an incomplete model or farewell."""
        self._incoming: list[Any] = []
        """Kind and version of these slices."""
        self._is_model_refused = False
        """True if a slice of the last model was refused, so that the site kept the model it had."""
        self._best: dict[str, torch.Tensor] = {}
        """Best model, from the farewell."""

    @property
    @override
    def samples(self) -> tuple[int, int, int]:
        validation, test = map(len, self.batches.held_out.values())
        return len(self.batches.train), validation, test

    @override
    def model(self) -> dict[str, dict[str, torch.Tensor]]:
        # The whole model without counters; weights that are not exchanged are the site's own.
        own = {name: tensor for name, tensor in self.trainer.weights().items() if tensor.is_floating_point()}
        return {"model": {**own, **self._best}}

    @override
    def choose(self, ready: Set[str]) -> str | None:
        # After a crash a model may be here before the update that it answers is made again. A report counts as one.
        update, _ = self.sequence.at(self.answered + 1)
        last = self._last_update + 1 if self._is_final else self._last_update
        return super().choose(ready) if update <= last else None

    @override
    def next(self) -> list[Effect]:
        if not self.at_work:
            return []
        update, _ = self.sequence.at(self.next_seq)
        if update <= self._last_update:
            return [self._send_next()]
        if self.answered // self.layout.slices < self._last_update:
            return []  # the answer to the last update is not here
        current = self._last_update + 1
        if current not in self._metrics:
            self._metrics[current] = self._evaluate_if_due()  # before training changes the model
            return [self._record_step()]
        if self._is_final:
            if self.next_seq > self._last_update * self.layout.slices + 1:
                return self.tell_all_sent()
            return [self._send_next()]
        if self.step < current * self.work.batches:
            self._train()
        if self.step == current * self.work.batches:
            self._updates[current] = self._make_update()
            self._versions[current] = self._version
            self._last_update = current
            if self.account is not None:
                return [Spend(self.step)]
        return [self._record_step()]

    @override
    def on_answer(self, message: Message) -> list[Effect]:
        header, scalars = message.header, message.scalars
        if not self._is_expected(header):
            raise mismatch(f"{header.message_id} is out of turn.")
        best, evaluated, is_final = int(scalars["best"]), int(scalars["judged"]), bool(scalars.get("final", False))
        is_progress = 0 <= best <= evaluated and self._evaluated <= evaluated <= self.candidates(header.version)
        if not is_progress or (header.kind is Kind.MODEL and not self._is_plausible(header, is_final)):
            raise mismatch(f"{header.message_id} has values that are impossible for model {header.version}.")
        _, number = self.sequence.at(header.seq)
        values = check_slice(message, self.layout, number).clone()
        model = [*self._slices, values]
        if header.kind is Kind.MODEL and not is_final and len(model) == self.layout.slices:
            self._expect_trainable(message, torch.cat(model))
        self.best = best
        return self._store_slice(header, number, values, evaluated, is_final)

    @override
    def refused(self, header: Header, refusal: Refused) -> list[Effect]:
        # If a slice of a model is refused, the site keeps the model it has.
        if self._is_final or (header.kind is Kind.FINISH and self._is_model_refused):
            raise RunError(601, f"the end of the run cannot be read: {refusal.sentence}", refusal.remedy)
        _, number = self.sequence.at(header.seq)
        return self._store_slice(header, number, None, self._evaluated, self._must_be_final(header))

    def candidates(self, version: int) -> int:
        """Return the highest number of models that can have been evaluated at a version of the server's model."""
        return version

    def _is_expected(self, header: Header) -> bool:
        """Return whether a message is next in the plan: a model answers an update, the farewell a report.

        A site that refused a model does not know whether it was the final one.
        """
        update, number = self.sequence.at(self.answered + 1)
        if header.kind is Kind.FINISH:
            expected = (self._is_final or self._is_model_refused) and header.version == self._version
            reply_to = 0
        else:
            expected = header.kind is Kind.MODEL and not self._is_final and update <= self._last_update
            reply_to = update * self.layout.slices
        is_whole = number == 1 or self._incoming == [header.kind.value, header.version]
        return expected and is_whole and (header.seq, header.reply_to) == (self.answered + 1, reply_to)

    def _is_plausible(self, header: Header, is_final: bool) -> bool:
        """Return whether a model may have its version and `is_final`."""
        may_stop_early = is_final and self.config.run.patience > 0
        return self._can_follow(header.version) and (may_stop_early or is_final is self._must_be_final(header))

    def _can_follow(self, version: int) -> bool:
        lowest = self._version if self.config.round.close == "buffered" else self._version + 1
        return lowest <= version <= self.config.round.rounds

    def _must_be_final(self, header: Header) -> bool:
        update, _ = self.sequence.at(self.answered + 1)
        return header.version == self.config.round.rounds or update == self.sequence.updates

    def _expect_trainable(self, message: Message, vector: torch.Tensor) -> None:
        """Refuse a model, float32 (length,), with bad statistics (307) or bad outputs for held-out samples (312)."""
        weights = self.layout.weights(vector)
        check_size(message, self.layout.vector(weights))
        size = self.config.run.batch_size
        inputs = torch.cat([dataset.inputs[:size] for dataset in self.batches.held_out.values()])
        if len(inputs) and not self.trainer.predict_with(weights, inputs).isfinite().all():
            remedy = f"{self.name} keeps the model it had; look at what the other sites send, or lower optimizer.lr."
            raise Refused(312, f"the model of {message.header.message_id} gives values that are not finite.", remedy)

    def _store_slice(
        self, header: Header, number: int, values: torch.Tensor | None, evaluated: int, is_final: bool
    ) -> list[Effect]:
        """Store a slice, None for a refused one; after the last, adopt the model if all its slices are here."""
        if number == 1:
            self._incoming = [header.kind.value, header.version]
        if values is not None:
            self._slices.append(values)
        self.record_answer(header.seq, evaluated)
        if number < self.layout.slices:
            return []
        slices, self._slices = self._slices, []
        self._is_model_refused = len(slices) < self.layout.slices
        if header.kind is Kind.FINISH and not self._is_model_refused:
            self._best = self.layout.weights(torch.cat(slices))
            self.finished = True
            return [Finish()]
        if not self._is_model_refused:
            self.base = torch.cat(slices)
        if self._can_follow(header.version):
            self._version = header.version
        self._is_final = is_final
        self.trainer.load(self.layout.weights(self.base))
        return []

    def _train(self) -> None:
        k = self.step
        inputs, targets = self.batches.batch(k)
        try:
            self.trainer.step(inputs, targets, self.batches.seed("trainer", k), self.batches.progress(k))
        except RunError as error:
            raise self._name_origin(error) from None
        self.step += 1

    def _make_update(self) -> torch.Tensor:
        """Return the update, float32 (length,); RunError 603 if a change is too large to be sent."""
        change = self.layout.vector(self.trainer.weights()) - self.base
        if not change.abs().max() <= VALUE_MAX:
            raise self._name_origin(divergence_error(f"training changed a weight by more than {VALUE_MAX:g}"))
        return change

    def _name_origin(self, error: RunError) -> RunError:
        """Add the server's model, which may be the cause, to an error of the training."""
        if not self._version:
            return error
        sentence = f"{error.sentence} It began with the server's model {self._version}."
        remedy = "another site's update may have spoilt that model: see the outliers in the server's report."
        return RunError(error.number, sentence, f"{error.remedy} If all is well here, {remedy}")

    def evaluate(self) -> str:
        """Measure the present model on the held-out patients, as JSON; no metrics if the server's was refused."""
        if self._is_model_refused:
            return NO_FIGURES
        metrics = {}
        for part, dataset in self.batches.held_out.items():
            if len(dataset):
                outputs, targets = self.trainer.predict(dataset.inputs), self.batches.targets(dataset)
                metrics[part.value] = measure(self.config.task, self.config.data, outputs, targets, dataset.patients)
        return encode_report(self.config.task, metrics)

    def evaluate_final(self) -> str:
        """Measure the final model for the report."""
        return self.evaluate()

    def report_tensors(self) -> Mapping[str, torch.Tensor]:
        """Return the tensors of the report."""
        return {}

    def _evaluate_if_due(self) -> str:
        if self._is_final:
            return self.evaluate_final()
        return self.evaluate() if is_evaluated(self.config, self._version) else NO_FIGURES

    def _record_step(self) -> Record:
        return Record({"event": "local", "step": self.step})

    def _send_next(self) -> Send:
        self.next_seq += 1
        return self.message(self.next_seq - 1)

    @override
    def message(self, seq: int) -> Send:
        update, number = self.sequence.at(seq)
        if update > self._last_update:
            metrics, tensors = {"metrics": self._metrics[update]}, self.report_tensors()
            return Send(SERVER, Kind.REPORT, seq, version=self._version, tensors=tensors, scalars=metrics)
        values = {"values": self._updates[update][self.layout.slice(number)]}
        metrics = {"metrics": self._metrics[update] if number == self.layout.slices else NO_FIGURES}
        return Send(SERVER, Kind.UPDATE, seq, version=self._versions[update], tensors=values, scalars=metrics)

    @property
    @override
    def hello_every(self) -> int:
        return min(super().hello_every, self.layout.slices)  # else the server would keep many models for the site

    @override
    def snapshot(self, first_unconfirmed: int | None) -> Snapshot:
        base = super().snapshot(first_unconfirmed)
        oldest, _ = self.sequence.at(self.oldest_seq(first_unconfirmed))
        for by_update in (self._updates, self._versions, self._metrics):
            for update in [update for update in by_update if update < oldest]:
                del by_update[update]
        tensors = {
            **base.tensors, **self.trainer.state(), "base": self.base, **flatten("update", self._updates),
            **flatten("arriving", dict(enumerate(self._slices))), **flatten("best", self._best),
        }  # fmt: skip
        facts: dict[str, Any] = {
            "trained": self.step, "version": self._version, "is_final": self._is_final, "made": self._last_update,
            "figures": {**self._metrics}, "versions": {**self._versions}, "arriving": len(self._slices),
            "under_way": self._incoming, "unread": self._is_model_refused,
        }  # fmt: skip
        return Snapshot(tensors, {**base.facts, **facts})

    @override
    def restore(self, snapshot: Snapshot) -> None:
        super().restore(snapshot)
        tensors, facts = snapshot.tensors, snapshot.facts
        self.trainer.restore(tensors)
        self.base, self._best = tensors["base"], under("best", tensors)
        self._updates = {int(update): tensor for update, tensor in under("update", tensors).items()}
        self._slices = [tensors[f"arriving/{n}"] for n in range(facts["arriving"])]
        self.step, self._version, self._is_final = facts["trained"], facts["version"], facts["is_final"]
        self._last_update, self._incoming, self._is_model_refused = facts["made"], facts["under_way"], facts["unread"]
        self._metrics = {int(update): text for update, text in facts["figures"].items()}
        self._versions = {int(update): version for update, version in facts["versions"].items()}
