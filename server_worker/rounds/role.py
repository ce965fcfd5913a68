"""Server's side of the Round shape: updates of sites, the end of a round, and the model that comes of it."""

from abc import abstractmethod
from collections.abc import Sequence, Set
from typing import Any

import torch
from typing_extensions import override

from nightsplit.server_worker.greeting import Samples
from nightsplit.server_worker.role import ServerRole
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.engine.effects import Effect, Record, Send
from nightsplit.shared.errors import Refused, mismatch
from nightsplit.shared.protocols.build import WholeModel
from nightsplit.shared.protocols.report import SiteMetrics
from nightsplit.shared.protocols.rounds import RoundSequence, Work, bounded, check_slice, is_evaluated
from nightsplit.shared.storage.checkpoint import Snapshot, flatten, under
from nightsplit.shared.wire.message import Header, Kind, Message, Scalar

SAMPLES_MAX = 1_000_000_000
"""Largest number of samples of a site. Nothing is stored per sample; more are a mistake."""


class RoundServer(ServerRole[RoundSequence]):
    """Base class of roles that combine the updates of sites, and answer each update with the next model.

        close = "all"       a round closes when every active site has reported
        close = "quorum"    or when `reports` sites have, and the deadline is over; a late update counts in the round
                            that is open when it comes, and its site continues with the model of that round
        close = "buffered"  when `reports` updates have come, from any sites; a site is answered at once
                            (FedBuff: Nguyen et al., AISTATS 2022)

    Only whole updates count: not one with a refused slice, nor one of a site excluded before the last slice.
    The staleness of an update is the number of combinations since the model that it began with: always 0 with "all".
    """

    def __init__(self, config: RunConfig, model: WholeModel) -> None:
        super().__init__(config, model.contract)
        self.layout = model.layout
        self.vector = model.layout.vector(model.module.state_dict())
        """Current model, float32 (length,)."""
        self.published = self.vector
        """Model that the run began with."""
        self._strict = config.run.order == "strict"
        self.journalled = not self._strict or config.run.may_exclude
        self._open: dict[str, list[torch.Tensor | None]] = {site: [] for site in config.run.sites}
        """Slices of each site's current update; None for one that was refused."""
        self._base_versions = dict.fromkeys(config.run.sites, 0)
        """Version of the model that each site's current update began with."""
        self._reported: dict[str, int] = {}
        """Sites with an unanswered update in the open round, and the number of its last slice."""
        self._arrived = 0
        """Number of updates in the open round."""
        self.is_last = False
        """True when the current model is the final one."""
        self._final: set[str] = set()
        """Sites that have the final model."""
        self._finished: set[str] = set()
        """Sites that have evaluated the final model."""

    @abstractmethod
    def add(self, site: str, update: Sequence[torch.Tensor], staleness: int) -> None:
        """Add a site's whole update, slices of float32, which are not changed."""

    @abstractmethod
    def combine(self) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the next model, float32 (length,), and the factor of each site whose update was an outlier.

        The model is made of `vector`, which is not changed, and the round's updates.
        """

    def add_final_figures(self, site: str, message: Message | None) -> list[Effect]:
        """Add a site's report on the final model, None for an unreadable one; Refused 304, 307 invalid, no change."""
        return self.add_figures(site, self.version, {} if message is None else self.read_figures(message, due=True))

    @override
    def choose(self, ready: Set[str]) -> str | None:
        # In strict order the first site that has not reported; else the one that has sent least.
        awaited = self._unreported()[:1] if self._strict else self._unreported()
        # A message may be here before its site's hello.
        candidates = [site for site in awaited if site in ready and site in self.sequences]
        # A partial update goes first, so that few of them are in memory at a time.
        return min(candidates, key=lambda site: (not self._open[site], self.applied[site]), default=None)

    @override
    def awaited(self) -> list[str]:
        return self._unreported() or (self.unsigned if self.done else [])

    def _unreported(self) -> list[str]:
        """Return the sites whose update, or report on the final model, the run waits for."""
        return [s for s in self.active_sites if s not in self._reported and s not in self._finished]

    @override
    def on(self, message: Message) -> list[Effect]:
        header = message.header
        if header.kind is Kind.HELLO:
            return self.handle_hello(message)
        self._check_turn(header)
        site = header.sender
        if site in self._final:
            return self._finish_site(header, self.add_final_figures(site, message))
        number = len(self._open[site]) + 1
        values = check_slice(message, self.layout, number)
        due = number == self.layout.slices and is_evaluated(self.config, self._base_versions[site])
        return self._add_slice(header, values, self.read_figures(message, due=due))

    def _check_turn(self, header: Header) -> None:
        """Raise Refused 304 unless a message is the next slice of a site's update, or its report on the final model."""
        site = header.sender
        kind = Kind.REPORT if site in self._final else Kind.UPDATE
        expected = (kind, self.applied[site] + 1, 0, self._base_versions[site])
        is_awaited = site in self.sequences and site in self._unreported()
        if not is_awaited or (header.kind, header.seq, header.reply_to, header.version) != expected:
            raise mismatch(f"{header.message_id} is out of turn.")

    @override
    def refused(self, header: Header, refusal: Refused) -> list[Effect]:
        # The update does not count, and the site continues as if it did.
        self.refusals[header.sender] += 1
        if header.sender in self._final:
            return self._finish_site(header, self.add_final_figures(header.sender, None))
        return self._add_slice(header, None, {})

    @override
    def exclude(self, sender: str) -> list[Effect]:
        # Its whole updates stay, and no site waits for it.
        self._reported.pop(sender, None)
        self._open[sender] = []
        effects = self.drop_site(sender)
        if self._ready_to_close(deadline_over=False):
            effects += self.close()
        return effects + self.end_if_done()

    @override
    def close(self) -> list[Effect]:
        """Combine the updates of the round, and answer the sites that wait; also called at the deadline of a quorum."""
        combined, outliers = self.combine()
        self.vector = bounded(combined)
        self._arrived = 0
        self.version += 1
        self.is_last = self.version >= self.config.round.rounds or self.evaluation.exhausted
        waiting, self._reported = self._reported, {}
        effects: list[Effect] = [Record({"event": "combine", "step": self.steps, "epoch": self.version})]
        for site, factor in outliers.items():
            effects += self.record_outliers(site, {"update": factor})
        for site, seq in waiting.items():
            effects += self._answer(site, seq)
        return effects

    @property
    @override
    def may_close(self) -> bool:
        """True when the round has its quorum, and waits only for the deadline."""
        return self._ready_to_close(deadline_over=True)

    # -- for the worker ----------------------------------------------------------------------------

    @override
    def weights(self) -> dict[str, torch.Tensor]:
        return self.layout.weights(self.vector)

    @override
    def weights_in(self, snapshot: Snapshot) -> dict[str, torch.Tensor]:
        return self.layout.weights(snapshot.tensors["vector"])

    @override
    def sequence_of(self, site: str, samples: Samples) -> RoundSequence:
        if max(samples) > SAMPLES_MAX:
            raise self.too_many(site, samples)
        return RoundSequence.of(self.config, samples.train, self.layout)

    @property
    @override
    def done(self) -> bool:
        return self._finished >= self.active_sites.keys()

    def _add_slice(self, header: Header, values: torch.Tensor | None, metrics: SiteMetrics) -> list[Effect]:
        """Add a slice of an update, None if it was refused; the last one completes the site's report."""
        site = header.sender
        self.applied[site] = header.seq
        self._open[site].append(values)
        if len(self._open[site]) < self.layout.slices:
            return []
        update = [values for values in self._open[site] if values is not None]
        self._open[site] = []
        if len(update) == self.layout.slices:
            self.add(site, update, self.version - self._base_versions[site])
        work = Work.of(self.config, self.sequences[site].train)
        self.batches[site] += work.batches
        self.samples[site] += work.samples
        self.steps += 1
        facts: dict[str, Scalar] = {"event": "train", "step": self.steps, "site": site, "epoch": self.version + 1}
        effects: list[Effect] = [Record({**facts, "loss": None, "staleness": self.version - self._base_versions[site]})]
        if self.config.round.close == "all" and is_evaluated(self.config, self._base_versions[site]):
            effects += self.add_figures(site, self._base_versions[site], metrics)
        self._reported[site] = header.seq
        self._arrived += 1
        if self.is_last:  # too late for the last round
            return effects + self._answer(site, self._reported.pop(site))
        if self._ready_to_close(deadline_over=False):
            return effects + self.close()
        if self.config.round.close == "buffered":
            effects += self._answer(site, self._reported.pop(site))
        return effects

    def _ready_to_close(self, deadline_over: bool) -> bool:
        """Return whether the open round may close, given that its deadline is over or that it is not."""
        section = self.config.round
        if self.is_last or not self._arrived:
            return False
        if section.close == "buffered":
            return self._arrived >= (section.reports or 1)
        if self._reported.keys() >= self.active_sites.keys():
            return True
        enough = section.close == "quorum" and len(self._reported) >= (section.reports or 1)
        return enough and (deadline_over or not section.deadline_hours)

    def _answer(self, site: str, seq: int) -> list[Effect]:
        """Answer the update that ended with message `seq` with the current model."""
        slices = self.layout.slices
        self._base_versions[site] = self.version
        self.sent[site] = seq
        if self.is_last:
            self._final.add(site)
        return [
            Send(
                site, Kind.MODEL, seq - slices + number, reply_to=seq, version=self.version,
                tensors={"values": self.vector[self.layout.slice(number)]},
                scalars={"final": self.is_last, **self.progress},
            )
            for number in range(1, slices + 1)
        ]  # fmt: skip

    def add_figures(self, site: str, version: int, metrics: SiteMetrics) -> list[Effect]:
        """Add a site's figures for a model."""
        return self.describe_candidate(version) if self.evaluation.report(site, version, metrics) else []

    @override
    def describe_candidate(self, candidate: int) -> list[Effect]:
        if self.evaluation.best == candidate:
            self.best_weights = self.weights()  # with "all" these are still the evaluated ones
        return super().describe_candidate(candidate)

    def _finish_site(self, header: Header, effects: list[Effect]) -> list[Effect]:
        """Mark a site as finished; return the effects of its report, with those of the end of the run."""
        self.applied[header.sender] = header.seq
        self._finished.add(header.sender)
        return effects + self.end_if_done()

    @override
    def end_if_done(self) -> list[Effect]:
        return self.end() if self.done and not self.unsigned else []

    @override
    def farewell(self) -> list[Send]:
        best = bounded(self.layout.vector(self.best_weights))
        return [
            Send(
                site, Kind.FINISH, self.applied[site] + number - 1, version=self.version,
                tensors={"values": best[self.layout.slice(number)]}, scalars={"summary": self.summary, **self.progress},
            )
            for site in self.active_sites
            for number in range(1, self.layout.slices + 1)
        ]  # fmt: skip

    @override
    def snapshot(self, first_unconfirmed: int | None) -> Snapshot:
        base = super().snapshot(first_unconfirmed)
        slices_by_name = {
            f"{site}/{index}": values
            for site, slices in self._open.items()
            for index, values in enumerate(slices)
            if values is not None
        }
        tensors = {**base.tensors, "vector": self.vector, **flatten("open", slices_by_name)}
        facts: dict[str, Any] = {
            "version": self.version, "begun": dict(self._base_versions),
            "open": {site: len(slices) for site, slices in self._open.items()},
            "reported": dict(self._reported), "arrived": self._arrived,
            "is_last": self.is_last, "final": sorted(self._final), "through": sorted(self._finished),
        }  # fmt: skip
        return Snapshot(tensors, {**base.facts, **facts})

    @override
    def restore(self, snapshot: Snapshot) -> None:
        super().restore(snapshot)
        tensors, facts = snapshot.tensors, snapshot.facts
        self.vector = tensors["vector"]
        slices = under("open", tensors)
        self._open = {
            site: [slices.get(f"{site}/{index}") for index in range(number)] for site, number in facts["open"].items()
        }
        self.version, self._arrived = facts["version"], facts["arrived"]
        self._base_versions, self._reported = facts["begun"], facts["reported"]
        self.is_last = facts["is_last"]
        self._final, self._finished = set(facts["final"]), set(facts["through"])
