"""The server's side of the Round shape: who has reported, when a round closes, what everybody goes on with."""

from abc import abstractmethod
from collections.abc import Sequence, Set
from typing import Any

import torch

from nightsplit.server_worker.role import Samples, ServerRole
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.engine.effects import Effect, Finish, Record, Send
from nightsplit.shared.errors import Refused, mismatch
from nightsplit.shared.protocols.build import WholeModel
from nightsplit.shared.protocols.report import SiteMetrics
from nightsplit.shared.protocols.rounds import RoundSequence, Work, bounded, check_slice, is_evaluated
from nightsplit.shared.storage.checkpoint import Snapshot, flatten, under
from nightsplit.shared.wire.message import Header, Kind, Message

MOST_SAMPLES = 1_000_000_000
"""Of a site. Nothing is held per sample; more are a mistake."""


class RoundServer(ServerRole[RoundSequence]):
    """Combines what sites report, and answers each report with the model that came of it.

        close = "all"       a round closes when every site that takes part has reported
        close = "quorum"    or when `reports` have, and the deadline is over; who is late counts in the round
                            that is open then, and goes on with the model that this one makes
        close = "buffered"  when `reports` updates have come, of whomever; a site is answered at once
                            (FedBuff: Nguyen et al., AISTATS 2022)

    An update counts whole or not at all: one of which a slice was refused does not, nor does one whose site
    left before the last slice. Its staleness is how often the server has combined since the model that the
    update began with: 0 for everybody with "all".
    """

    def __init__(self, config: RunConfig, model: WholeModel) -> None:
        super().__init__(config, model.contract)
        self.layout = model.layout
        self.vector = model.layout.vector(model.module.state_dict())
        """The present model, float32 (length,)."""
        self.published = self.vector
        """The model that the run began with."""
        self._strict = config.run.order == "strict"
        self.journalled = not self._strict or config.run.may_exclude
        self._open: dict[str, list[torch.Tensor | None]] = {site: [] for site in config.run.sites}
        """Slices of each site's present update; None for one that was refused."""
        self._begun = dict.fromkeys(config.run.sites, 0)
        """Version of the model that each site's present update began with."""
        self._reported: dict[str, int] = {}
        """Sites whose update is in the open round, and the number of its last slice, which is not answered yet."""
        self._arrived = 0
        """Updates in the open round."""
        self.is_last = False
        """Whether the present model is the final one."""
        self._final: set[str] = set()
        """Sites that have the final model."""
        self._through: set[str] = set()
        """Sites that have judged the final model."""

    # -- what a system fills in ------------------------------------------------------------------

    @abstractmethod
    def add(self, site: str, update: Sequence[torch.Tensor], staleness: int) -> None:
        """Take a site's whole update, slices of float32, which are not changed."""

    @abstractmethod
    def combine(self) -> torch.Tensor:
        """The next model, float32 (length,), of `vector`, which is not changed, and the updates of the open round."""

    def take_final_figures(self, site: str, message: Message | None) -> list[Effect]:
        """Note a site's report on the final model; None for one that could not be read.

        Raises:
            Refused: 304, 307 it is no such report; nothing is noted.
        """
        return self.take_figures(site, self.version, {} if message is None else self.figures(message, due=True))

    # -- Role ------------------------------------------------------------------------------------

    def choose(self, ready: Set[str]) -> str | None:
        """See `Role`: in strict order the first site that has not reported; else who has sent least."""
        awaited = self.awaited()[:1] if self._strict else self.awaited()
        # A message may be here before its site's hello.
        known = [site for site in awaited if site in ready and site in self.sequences]
        # An update that has begun goes first, so that few of them are held at a time.
        return min(known, key=lambda site: (not self._open[site], self.applied[site]), default=None)

    def awaited(self) -> list[str]:
        """See `ServerRole`."""
        return [s for s in self.active_sites if s not in self._reported and s not in self._through]

    def on(self, message: Message) -> list[Effect]:
        """See `Role`."""
        header = message.header
        if header.kind is Kind.HELLO:
            return self.handle_hello(message)
        self._expect_in_place(header)
        site = header.sender
        if site in self._final:
            return self._through_with(header, self.take_final_figures(site, message))
        number = len(self._open[site]) + 1
        values = check_slice(message, self.layout, number)
        judged = number == self.layout.slices and is_evaluated(self.config, self._begun[site])
        return self._take(header, values, self.figures(message, due=judged))

    def _expect_in_place(self, header: Header) -> None:
        """A site that is known sends the slices of its update in order, and behind the final model its report."""
        site = header.sender
        expected = (Kind.REPORT if site in self._final else Kind.UPDATE, self.applied[site] + 1, 0, self._begun[site])
        is_awaited = site in self.sequences and site in self.awaited()
        if not is_awaited or (header.kind, header.seq, header.reply_to, header.version) != expected:
            raise mismatch(f"{header.message_id} is out of turn.")

    def refused(self, header: Header, refusal: Refused) -> list[Effect]:
        """See `Role`: an update less; the site goes on as if it had counted."""
        self.refusals[header.sender] += 1
        if header.sender in self._final:
            return self._through_with(header, self.take_final_figures(header.sender, None))
        return self._take(header, None, {})

    def exclude(self, sender: str) -> list[Effect]:
        """See `Role`: whole updates that the site gave stay, and nobody waits for it."""
        self._reported.pop(sender, None)
        self._open[sender] = []
        effects = self.drop_site(sender)
        if self._ready_to_close(deadline=False):
            effects += self.close()
        return effects + self._over()

    def close(self) -> list[Effect]:
        """Combine what came, and answer who waits for it. Also called when the deadline of a quorum is over."""
        self.vector = bounded(self.combine())
        self._arrived = 0
        self.version += 1
        self.is_last = self.version >= self.config.round.rounds or self.evaluation.exhausted
        waiting, self._reported = self._reported, {}
        effects: list[Effect] = [Record({"event": "combine", "step": self.steps, "epoch": self.version})]
        for site, seq in waiting.items():
            effects += self._answer(site, seq)
        return effects

    @property
    def may_close(self) -> bool:
        """See `ServerRole`: the round has its quorum, and waits for more until the deadline."""
        return self._ready_to_close(deadline=True)

    # -- what the worker asks ----------------------------------------------------------------------

    def weights(self) -> dict[str, torch.Tensor]:
        """See `ServerRole`."""
        return self.layout.weights(self.vector)

    def weights_in(self, snapshot: Snapshot) -> dict[str, torch.Tensor]:
        """See `ServerRole`."""
        return self.layout.weights(snapshot.tensors["vector"])

    def sequence_of(self, site: str, samples: Samples) -> RoundSequence:
        """See `ServerRole`."""
        if max(samples) > MOST_SAMPLES:
            raise self.implausible(site, samples)
        return RoundSequence.of(self.config, samples.train, self.layout)

    @property
    def done(self) -> bool:
        """See `ServerRole`."""
        return self._through >= self.active_sites.keys()

    # -- inside ------------------------------------------------------------------------------------

    def _take(self, header: Header, values: torch.Tensor | None, metrics: SiteMetrics) -> list[Effect]:
        """Keep a slice of an update, None if it was refused; with the last one the site has reported."""
        site = header.sender
        self.applied[site] = header.seq
        self._open[site].append(values)
        if len(self._open[site]) < self.layout.slices:
            return []
        update = [values for values in self._open[site] if values is not None]
        self._open[site] = []
        if len(update) == self.layout.slices:
            self.add(site, update, self.version - self._begun[site])
        work = Work.of(self.config, self.sequences[site].train)
        self.batches[site] += work.batches
        self.samples[site] += work.samples
        self.steps += 1
        late, epoch = self.version - self._begun[site], self.version + 1
        trained = Record(
            {"event": "train", "step": self.steps, "site": site, "epoch": epoch, "loss": None, "staleness": late}
        )
        effects: list[Effect] = [trained]
        if self.config.round.close == "all" and is_evaluated(self.config, self._begun[site]):
            effects += self.take_figures(site, self._begun[site], metrics)
        self._reported[site] = header.seq
        self._arrived += 1
        if self.is_last:  # it came too late for the last round
            return effects + self._answer(site, self._reported.pop(site))
        if self._ready_to_close(deadline=False):
            return effects + self.close()
        if self.config.round.close == "buffered":
            effects += self._answer(site, self._reported.pop(site))
        return effects

    def _ready_to_close(self, deadline: bool) -> bool:
        """Whether the open round may close: with the deadline over, or without."""
        section, active_sites = self.config.round, self.active_sites
        if self.is_last or not self._arrived:
            return False
        if section.close == "buffered":
            return self._arrived >= (section.reports or 1)
        if self._reported.keys() >= active_sites.keys():
            return True
        enough = section.close == "quorum" and len(self._reported) >= (section.reports or 1)
        return enough and (deadline or not section.deadline_hours)

    def _answer(self, site: str, seq: int) -> list[Effect]:
        """The present model, in answer to the update that ended with message `seq`."""
        slices = self.layout.slices
        self._begun[site] = self.version
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

    def take_figures(self, site: str, version: int, metrics: SiteMetrics) -> list[Effect]:
        """Note a site's figures for a model."""
        return self.describe_candidate(version) if self.evaluation.report(site, version, metrics) else []

    def describe_candidate(self, candidate: int) -> list[Effect]:
        """See `ServerRole`; with "all" no site has combined since, so the present weights are the judged ones."""
        if self.evaluation.best == candidate:
            self.best_weights = self.weights()
        return super().describe_candidate(candidate)

    def _through_with(self, header: Header, judged: list[Effect]) -> list[Effect]:
        self.applied[header.sender] = header.seq
        self._through.add(header.sender)
        return judged + self._over()

    def _over(self) -> list[Effect]:
        return self.end() if self.done else []

    def end(self) -> list[Effect]:
        """See `ServerRole`: everybody gets the best model."""
        self._ended = True
        if not self.best_weights:
            self.best_weights = self.weights()
        best = bounded(self.layout.vector(self.best_weights))
        farewell = [
            Send(
                site, Kind.FINISH, self.applied[site] + number - 1, version=self.version,
                tensors={"values": best[self.layout.slice(number)]}, scalars={"summary": self.summary, **self.progress},
            )
            for site in self.active_sites
            for number in range(1, self.layout.slices + 1)
        ]  # fmt: skip
        return [Finish(tuple(farewell))]

    # -- snapshot ----------------------------------------------------------------------------------

    def snapshot(self, first_unconfirmed: int | None) -> Snapshot:
        """See `Role`."""
        base = super().snapshot(first_unconfirmed)
        came = {
            f"{site}/{place}": values
            for site, slices in self._open.items()
            for place, values in enumerate(slices)
            if values is not None
        }
        tensors = {**base.tensors, "vector": self.vector, **flatten("open", came)}
        facts: dict[str, Any] = {
            "version": self.version, "begun": dict(self._begun),
            "open": {site: len(slices) for site, slices in self._open.items()},
            "reported": dict(self._reported), "arrived": self._arrived,
            "is_last": self.is_last, "final": sorted(self._final), "through": sorted(self._through),
        }  # fmt: skip
        return Snapshot(tensors, {**base.facts, **facts})

    def restore(self, snapshot: Snapshot) -> None:
        """See `Role`."""
        super().restore(snapshot)
        tensors, facts = snapshot.tensors, snapshot.facts
        self.vector = tensors["vector"]
        came = under("open", tensors)
        self._open = {
            site: [came.get(f"{site}/{place}") for place in range(number)] for site, number in facts["open"].items()
        }
        self.version, self._arrived = facts["version"], facts["arrived"]
        self._begun, self._reported = facts["begun"], facts["reported"]
        self.is_last = facts["is_last"]
        self._final, self._through = set(facts["final"]), set(facts["through"])
