"""The server's side of the Stream shape: order, evaluation, averaging, the end. Systems add `learn`."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections import Counter, deque
from collections.abc import Mapping, Set
from typing import Any

import torch

from server_worker.evaluation import Evaluation
from server_worker.schedule import SCHEDULES
from server_worker.top import Top
from shared.checkpoint import Snapshot, flatten, under
from shared.config import RunConfig
from shared.contract import Payload
from shared.effects import Effect, Finish, Record, Send
from shared.errors import Refused
from shared.message import SERVER, Header, Kind, Message, Scalar
from shared.protocols.plan import Item, Plan, Step
from shared.protocols.stream import ANY, UpSequence, check_contract, check_rows, weights
from shared.roles import Role

MOST_ITEMS = 10_000_000
"""Of a site's plan: it is held in memory, and a hello must not make the server run out of that."""


class StreamServer(Role):
    """Holds the top, answers each site's messages in its order, and judges every epoch.

    Args:
        config: the run.
        top: the server's layers.
        contract: payload of each kind (`shared.protocols.stream.payloads`).
    """

    rederives = False

    def __init__(self, config: RunConfig, top: Top, contract: Mapping[Kind, Payload]) -> None:
        super().__init__(SERVER)
        self.config = config
        self.top = top
        self.evaluation = Evaluation(config)
        self.best_top: dict[str, torch.Tensor] = {}
        """Weights of the best epoch; empty before one was judged."""
        self.applied = dict.fromkeys(config.run.sites, 0)
        """Messages in sequence applied, per site."""
        self.refusals: Counter[str] = Counter()
        self.batches: Counter[str] = Counter()
        """Training batches that were applied, per site."""
        self.samples: Counter[str] = Counter()
        """Samples in these batches, per site."""
        self.sequences: dict[str, UpSequence] = {}
        self.steps = 0
        """Training steps of the top."""
        self._contract = contract
        self._schedule = SCHEDULES[config.run.order](config.run.sites)
        self.journalled = self._schedule.journalled or config.run.may_leave_out
        self._opened = False
        self._ended = False
        self._released = dict.fromkeys(config.run.sites, 0)
        """Answers that each site's queue has forgotten, as far as the site has told."""
        self._welcomed: dict[str, list[str]] = {site: [] for site in config.run.sites}
        """Incarnations of each site whose hello was accepted."""
        self._answered_at: dict[str, deque[int]] = {
            site: deque(maxlen=2 * config.run.window + 2) for site in config.run.sites
        }
        self._bottoms: dict[str, dict[str, torch.Tensor]] = {}
        """Bottoms to be averaged."""
        self._waiting: dict[str, int] = {}
        """Sites that wait for the mean, and which of their messages it answers."""
        self._averaged: Counter[str] = Counter()
        """Averagings that each site has taken part in."""
        self._tops: dict[int, dict[str, torch.Tensor]] = {}
        """The top as the last site had evaluated it, for epochs that are judged when a site is left out."""

    # -- what a system fills in ------------------------------------------------------------------

    @abstractmethod
    def learn(self, site: str, q: int, item: Item, message: Message) -> list[Effect]:
        """Apply a site's message about item q; returns its answer and metrics.

        Raises:
            Refused: the message cannot be applied; nothing was changed.
        """

    # -- Role ------------------------------------------------------------------------------------

    def payload(self, kind: Kind) -> Payload | None:
        """See `Role`."""
        return self._contract.get(kind)

    def start(self) -> list[Effect]:
        """Open the run at the first start: its configuration is the first message in each down queue."""
        if self._ended:
            return self.end()
        if self._opened:
            return []
        self._opened = True
        return [self._manifest(site) for site in self.config.run.sites]

    def choose(self, ready: Set[str]) -> str | None:
        """See `Role`: the schedule's choice, among sites that do not wait for an averaging."""
        return self._schedule.choose(ready, self._waiting.keys(), self.sequences, self.staying)

    def on(self, message: Message) -> list[Effect]:
        """See `Role`."""
        if message.header.kind is Kind.HELLO:
            return self._welcome(message)
        site, seq = message.header.sender, message.header.seq
        q, _ = self.sequences[site].at(seq)
        plan = self.sequences[site].plan
        item = plan.item(q)
        if message.header.version != plan.version_of(q):
            raise Refused(
                304,
                f"{message.header.message_id} was made by bottom version {message.header.version}, "
                f"item {q} needs {plan.version_of(q)}.",
                "run the same version of nightsplit at the site and the server.",
            )
        if message.header.kind is Kind.BOTTOM and item.step is not Step.AVERAGE:
            raise Refused(304, f"{message.header.message_id} is out of turn.", "run the same version at both sides.")
        check_rows(message, plan, q)
        handle = self._collect if item.step is Step.AVERAGE else self.learn
        effects = handle(site, q, item, message)
        return effects + self._settle(site, seq)

    def refused(self, header: Header, refusal: Refused) -> list[Effect]:
        """See `Role`: the site is told, and counts the item as one without a gradient."""
        self.refusals[header.sender] += 1
        scalars: dict[str, Scalar] = {"number": refusal.number, "reason": refusal.sentence}
        effects: list[Effect] = [self.answer(header.sender, header.seq, Kind.REFUSED, scalars=scalars)]
        q, _ = self.sequences[header.sender].at(header.seq)
        sequence = self.sequences[header.sender]
        if sequence.plan.item(q).step is Step.AVERAGE and header.seq == sequence.settles(q):
            self._averaged[header.sender] += 1
            effects += self._average()  # the others must not wait for it
        return effects + self._settle(header.sender, header.seq)

    def excuse(self, sender: str) -> list[Effect]:
        """See `Role`: the run averages, judges and ends without the site; what it gave stays."""
        self.left_out[sender] = sum(self.applied.values())
        self._waiting.pop(sender, None)
        effects: list[Effect] = [self._rejection(sender, ANY, self._farewell_to(sender))]
        for epoch in self.evaluation.excuse(sender):
            effects += self._judged(epoch)
        if self._waiting:
            effects += self._average()
        return effects + self._over()

    # -- what the worker asks ----------------------------------------------------------------------

    @property
    def staying(self) -> dict[str, int]:
        """Messages in sequence applied, per site that takes part."""
        return {site: applied for site, applied in self.applied.items() if site not in self.left_out}

    @property
    def done(self) -> bool:
        """Whether the last message of every site that takes part was applied."""
        return all(s in self.sequences and n == self.sequences[s].last for s, n in self.staying.items())

    def awaited(self) -> list[str]:
        """Sites without whose next message the run cannot go on, or cannot end."""
        return self._schedule.awaited(self._waiting.keys(), self.sequences, self.staying)

    def contribution(self, site: str) -> dict[str, Scalar | None]:
        """What a site gave to the training, and behind how many messages it was left out, if it was."""
        return {
            "batches": self.batches[site], "samples": self.samples[site], "share": self.share(site),
            "left_out_at": self.left_out.get(site),
        }  # fmt: skip

    def share(self, site: str) -> float:
        """What part of the training steps came from a site, 0 to 1."""
        return self.batches[site] / max(1, self.batches.total())

    # -- parts that systems use ------------------------------------------------------------------

    def answer(
        self,
        site: str,
        seq: int,
        kind: Kind,
        tensors: Mapping[str, torch.Tensor] = {},
        scalars: Mapping[str, Scalar] = {},
    ) -> Send:
        """The one answer to message `seq` of a site, with the verdict on the epochs so far."""
        verdict = {"best": self.evaluation.best, "judged": self.evaluation.judged}
        return Send(site, kind, seq, reply_to=seq, tensors=tensors, scalars={**scalars, **verdict})

    def trained(self, site: str, q: int, item: Item, loss: float | None) -> Record:
        """Count a training step and describe it; the loss is None where only the site knows it."""
        self.steps += 1
        self.contributed(site, q)
        sequence = self.sequences[site]
        version = sequence.plan.version_of(q)
        settled = self._answered_at[site]
        # Answers given to this site since the one that completed the bottom version of this batch.
        since = self.applied[site] - sequence.settles(version) if version else self.applied[site]
        then = settled[-since - 1] if since < len(settled) else 0
        return Record(
            {
                "event": "train", "step": self.steps, "site": site, "epoch": item.epoch,
                "loss": loss, "staleness": self.steps - 1 - then,
            }
        )  # fmt: skip

    def contributed(self, site: str, q: int) -> None:
        """Count training item q as one that the top learns from."""
        self.batches[site] += 1
        self.samples[site] += len(self.sequences[site].plan.rows(q))

    def evaluated(self, epoch: int, judged: bool) -> list[Effect]:
        """After a site's block: where that judged the epoch, remember the best model and describe it."""
        self._tops.pop(epoch, None)
        if judged:
            return self._judged(epoch)
        if self.config.run.may_leave_out:
            self._tops[epoch] = self.top.weights()
        return []

    def _judged(self, epoch: int) -> list[Effect]:
        entry, top = self.evaluation.of(epoch), self._tops.pop(epoch, None)
        assert entry is not None
        if self.evaluation.best == epoch:
            self.best_top = top or self.top.weights()
        event: dict[str, Scalar] = {"event": "evaluate", "step": self.steps, "epoch": epoch}
        lines: list[Effect] = [
            Record({**event, "site": site, "part": part, **figures})
            for site, metrics in [*entry["sites"].items(), ("overall", entry["overall"])]
            for part, figures in metrics.items()
        ]
        return lines

    # -- hello, averaging, end ---------------------------------------------------------------------

    def _manifest(self, site: str) -> Send:
        manifest = {"config": self.config.canonical(), "contract": self.config.contract}
        return Send(site, Kind.MANIFEST, 0, scalars=manifest)

    def _welcome(self, message: Message) -> list[Effect]:
        """Accept a site's plan, or say why not."""
        site, hello = message.header.sender, message.scalars
        plan = Plan.of(self.config, int(hello["train"]), int(hello["validation"]), int(hello["test"]))
        if min(plan.train, plan.validation, plan.test) < 0 or plan.most_items > MOST_ITEMS:
            raise Refused(
                308,
                f"{site} announces {plan.train}, {plan.validation} and {plan.test} samples.",
                "check the site's data; a run may have ten million messages per site.",
            )
        sequence = UpSequence(plan, has_head=Kind.HEAD_INPUT in self._contract)
        problem: tuple[int, str] | None = None
        if site in self.left_out:
            problem = self._farewell_to(site)
        elif hello["contract"] != self.config.contract:
            problem = 601, "the site's run.toml differs from the server's"
        elif hello["enrolled"] and plan.train < 1:
            problem = 405, "the site has nothing to train on"
        elif hello["enrolled"] and site in self.sequences and self.sequences[site] != sequence:
            problem = 409, "the site's data changed since the run began"
        elif hello["incarnation"] not in self._welcomed[site] and int(hello["mark"]) < self._released[site]:
            problem = 504, f"the site stands at answer {hello['mark']}, but had stored {self._released[site]} before"
        if problem is not None:
            return [self._rejection(site, str(hello["incarnation"]), problem)]
        if not hello["enrolled"]:
            return [self._manifest(site)]
        # A hello may come again after a later one; only a new process can have lost its state.
        if hello["incarnation"] not in self._welcomed[site]:
            self._welcomed[site].append(str(hello["incarnation"]))
        self._released[site] = max(self._released[site], int(hello["released"]))
        self.sequences[site] = sequence
        return []

    def _rejection(self, site: str, incarnation: str, problem: tuple[int, str]) -> Send:
        scalars: dict[str, Scalar] = {"incarnation": incarnation, "number": problem[0], "reason": problem[1]}
        return Send(site, Kind.REJECTED, 0, scalars=scalars)

    def _farewell_to(self, site: str) -> tuple[int, str]:
        hours = self.config.run.absence_hours
        return (608, f"it was silent for {hours:g} h, and the run went on without it")

    def _collect(self, site: str, q: int, item: Item, message: Message) -> list[Effect]:
        """Take a site's bottom; let the site wait for the mean behind the last message about item q."""
        if message.header.kind is Kind.BOTTOM:
            self._bottoms[site] = {name: tensor.clone() for name, tensor in message.tensors.items()}
        seq = message.header.seq
        if seq != self.sequences[site].settles(q):
            return [self.answer(site, seq, Kind.NOTED)]
        self._averaged[site] += 1
        self._waiting[site] = seq
        return self._average()

    def _average(self) -> list[Effect]:
        """Answer with the mean of the bottoms when all sites that take part have sent theirs.

        Weighted by training samples (McMahan et al., AISTATS 2017, algorithm 1). A site whose plan
        has no such averaging any more, or whose bottom was refused, has no part in the mean.
        """
        number = max(self._averaged.values())
        staying = self.staying
        partners = [s for s in staying if s in self.sequences and self.sequences[s].plan.averagings >= number]
        if not staying.keys() <= self.sequences.keys() or any(self._averaged[s] < number for s in partners):
            return []
        givers = [s for s in self.config.run.sites if s in self._bottoms]
        total = sum(self.sequences[s].plan.train for s in givers)
        share = {s: self.sequences[s].plan.train / total for s in givers}
        mean = {
            name: torch.stack([self._bottoms[s][name] * share[s] for s in givers]).sum(0)
            for name in (self._bottoms[givers[0]] if givers else ())
        }
        kind = Kind.AVERAGE if givers else Kind.NOTED
        answers: list[Effect] = [self.answer(s, seq, kind, mean) for s, seq in self._waiting.items()]
        self._bottoms.clear()
        self._waiting.clear()
        return answers

    def _settle(self, site: str, seq: int) -> list[Effect]:
        """Count a message as applied; end the run behind the last one."""
        self.applied[site] = seq
        self._answered_at[site].append(self.steps)
        return self._over()

    def _over(self) -> list[Effect]:
        return self.complete() if self.done else self.end() if self.evaluation.exhausted else []

    def complete(self) -> list[Effect]:
        """Every site's last message was applied."""
        return self.end()

    def end(self) -> list[Effect]:
        """The run is over: by its plan, or because it no longer improves."""
        self._ended = True
        if not self.best_top:
            self.best_top = self.top.weights()
        tensors = {}
        if self.config.run.export_top:
            tensors = {name: self.best_top[name] for name in weights(self.top.module)}
        summary = json.dumps(self.evaluation.of(self.evaluation.best), sort_keys=True)
        farewell = [
            self.answer(site, self.farewell_seq(site), Kind.FINISH, tensors, {"summary": summary})
            for site in self.staying
        ]
        return [Finish(tuple(farewell))]

    def farewell_seq(self, site: str) -> int:
        """Number of the last message to a site: one behind its last answer."""
        return self.applied[site] + 1

    # -- snapshot ----------------------------------------------------------------------------------

    def snapshot(self, first_unconfirmed: int | None) -> Snapshot:
        """See `Role`."""
        tensors = {**self.top.state(), **self.evaluation.tensors(), **dict(flatten("best", self.best_top))}
        for site, bottom in self._bottoms.items():
            tensors.update(flatten(f"bottom/{site}", bottom))
        for epoch, top in self._tops.items():
            tensors.update(flatten(f"open_top/{epoch}", top))
        facts: dict[str, Any] = {
            "contract": self.config.contract,
            "opened": self._opened, "ended": self._ended, "steps": self.steps, "applied": dict(self.applied),
            "released": dict(self._released), "refusals": dict(self.refusals),
            "welcomed": {site: list(incarnations) for site, incarnations in self._welcomed.items()},
            "answered_at": {site: list(steps) for site, steps in self._answered_at.items()},
            "plans": {s: [seq.plan.train, seq.plan.validation, seq.plan.test] for s, seq in self.sequences.items()},
            "bottoms": list(self._bottoms), "waiting": dict(self._waiting), "averaged": dict(self._averaged),
            "left_out": dict(self.left_out), "open_tops": list(self._tops),
            "batches": dict(self.batches), "samples": dict(self.samples),
            "evaluation": self.evaluation.facts(),
        }  # fmt: skip
        return Snapshot(tensors, facts)

    def restore(self, snapshot: Snapshot) -> None:
        """See `Role`."""
        tensors, facts = snapshot.tensors, snapshot.facts
        check_contract(facts["contract"], self.config, self.name)
        self.top.restore(tensors)
        self.evaluation.restore(tensors, facts["evaluation"])
        self.best_top = under("best", tensors)
        self._opened, self._ended, self.steps = facts["opened"], facts["ended"], facts["steps"]
        self.applied, self._released = facts["applied"], facts["released"]
        self._welcomed = facts["welcomed"]
        self.refusals = Counter(facts["refusals"])
        for site, steps in facts["answered_at"].items():
            self._answered_at[site].extend(steps)
        has_head = Kind.HEAD_INPUT in self._contract
        self.sequences = {
            site: UpSequence(Plan.of(self.config, *counts), has_head) for site, counts in facts["plans"].items()
        }
        self._bottoms = {site: under(f"bottom/{site}", tensors) for site in facts["bottoms"]}
        self._waiting = facts["waiting"]
        self._averaged = Counter(facts["averaged"])
        self.left_out = facts["left_out"]
        self._tops = {epoch: under(f"open_top/{epoch}", tensors) for epoch in facts["open_tops"]}
        self.batches, self.samples = Counter(facts["batches"]), Counter(facts["samples"])
