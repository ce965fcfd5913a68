"""What the server's side of every system does: it opens the run, greets the sites, counts what they give, and ends."""

import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch

from nightsplit.server_worker.evaluation import Evaluation
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.engine.effects import Effect, Record, Send
from nightsplit.shared.engine.role import Role
from nightsplit.shared.errors import Refused, mismatch
from nightsplit.shared.protocols.handshake import ANY, check_digest
from nightsplit.shared.protocols.report import NO_FIGURES, SiteMetrics, decode_report
from nightsplit.shared.storage.checkpoint import Snapshot, flatten, under
from nightsplit.shared.wire.message import SERVER, Kind, Message, Scalar
from nightsplit.shared.wire.schema import Payload

MOST_INCARNATIONS = 8
"""Of a site, that are remembered."""
LONGEST_INCARNATION = 64
"""Characters in the name of one."""


class Samples(NamedTuple):
    """How many samples a site has in each part."""

    train: int
    validation: int
    test: int


class Sequence(Protocol):
    """What a site is going to send, as far as its greeting tells."""

    @property
    def last(self) -> int:
        """Number of its last message; an upper bound where that depends on others."""

    @property
    def answers(self) -> int:
        """Number of the last message to it, likewise."""

    @property
    def train(self) -> int:
        """Its training samples."""


S = TypeVar("S", bound=Sequence)


class ServerRole(Role, Generic[S]):
    """Opens the run, accepts sites and their messages in sequence, and judges every candidate for the best model."""

    rederives = False

    def __init__(self, config: RunConfig, contract: Mapping[Kind, Payload]) -> None:
        super().__init__(SERVER)
        self.config = config
        self.evaluation = Evaluation(config)
        self.best_weights: dict[str, torch.Tensor] = {}
        """Weights of the best candidate; empty before one was judged."""
        self.applied = dict.fromkeys(config.run.sites, 0)
        """Messages in sequence applied, per site."""
        self.refusals: Counter[str] = Counter()
        self.batches: Counter[str] = Counter()
        """Training batches that the model learned from, per site."""
        self.samples: Counter[str] = Counter()
        """Samples in these batches, per site."""
        self.sequences: dict[str, S] = {}
        self.steps = 0
        """Training steps of the server's weights."""
        self.version = 0
        """How often the server has combined what sites reported; 0 in systems that do not."""
        self._contract = contract
        self._opened = False
        self._ended = False
        self._counts: dict[str, Samples] = {}
        self._released = dict.fromkeys(config.run.sites, 0)
        """Answers that each site's queue has forgotten, as far as the site has told."""
        self._greeted: dict[str, list[str]] = {site: [] for site in config.run.sites}
        """Incarnations of each site whose hello was accepted, the latest few: nobody listens for an earlier one."""

    # -- what a shape fills in -------------------------------------------------------------------

    @abstractmethod
    def weights(self) -> dict[str, torch.Tensor]:
        """CPU copies of the server's present weights."""

    @abstractmethod
    def weights_in(self, snapshot: Snapshot) -> dict[str, torch.Tensor]:
        """The present weights of the moment of a snapshot."""

    @abstractmethod
    def sequence_of(self, site: str, samples: Samples) -> S:
        """What a site with so many samples sends; Refused 308 where there can be no such site."""

    @abstractmethod
    def awaited(self) -> list[str]:
        """Sites without whose next message the run cannot go on, or cannot end."""

    @abstractmethod
    def end(self) -> list[Effect]:
        """The run is over; repeated by a server that is started again."""

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

    # -- what the worker asks ----------------------------------------------------------------------

    @property
    def active_sites(self) -> dict[str, int]:
        """Messages in sequence applied, per site that takes part."""
        # In the order of run.toml: a restored snapshot has its keys in the order of the alphabet.
        return {site: self.applied[site] for site in self.config.run.sites if site not in self.excluded}

    @property
    def may_close(self) -> bool:
        """Whether `close` would let the run go on."""
        return False

    @property
    def done(self) -> bool:
        """Whether the last message of every site that takes part was applied."""
        return all(s in self.sequences and n == self.sequences[s].last for s, n in self.active_sites.items())

    def contribution(self, site: str) -> dict[str, Scalar | None]:
        """What a site gave to the training, and behind how many messages it was left out, if it was."""
        return {
            "batches": self.batches[site], "samples": self.samples[site], "share": self.share(site),
            "excluded_at": self.excluded.get(site),
        }  # fmt: skip

    def share(self, site: str) -> float:
        """What part of the training batches came from a site, 0 to 1."""
        return self.batches[site] / max(1, self.batches.total())

    def outcome(self) -> dict[str, Any]:
        """Return further entries for the report."""
        return {}

    def publish(self, folder: Path) -> None:
        """Write what else a finished run leaves in its report folder."""

    def help(self) -> None:
        """Compute for the server that another process is, until it leaves, where such work can be divided."""
        raise NotImplementedError

    # -- parts that shapes use ---------------------------------------------------------------------

    def handle_hello(self, message: Message) -> list[Effect]:
        """Accept a site's plan, or say why not."""
        site, hello = message.header.sender, message.scalars
        samples = Samples(int(hello["train"]), int(hello["validation"]), int(hello["test"]))
        incarnation, mark, released = str(hello["incarnation"]), int(hello["mark"]), int(hello["released"])
        sequence = self.sequence_of(site, samples)
        known = sequence.answers if hello["enrolled"] else mark
        if len(incarnation) > LONGEST_INCARNATION or not 0 <= released <= mark <= known:
            stands = f"answer {mark}, {released} of them stored"
            raise mismatch(f"{site} says hello with {stands}, and a name of {len(incarnation)} characters.")
        problem: tuple[int, str] | None = None
        if site in self.excluded:
            problem = self._exclusion_notice(site)
        elif hello["contract"] != self.config.digest:
            problem = 601, "the site's run.toml differs from the server's"
        elif hello["enrolled"] and samples.train < 1:
            problem = 405, "the site has nothing to train on"
        elif hello["enrolled"] and self._counts.get(site, samples) != samples:
            problem = 409, "the site's data changed since the run began"
        elif incarnation not in self._greeted[site] and mark < self._released[site]:
            problem = 504, f"the site stands at answer {mark}, but had stored {self._released[site]} before"
        if problem is not None:
            return [self._rejection(site, incarnation, problem)]
        if not hello["enrolled"]:
            return [self._manifest(site)]
        # A hello may come again after a later one; only a new process can have lost its state.
        if incarnation not in self._greeted[site]:
            self._greeted[site] = [*self._greeted[site], incarnation][-MOST_INCARNATIONS:]
        self._released[site] = max(self._released[site], released)
        self.sequences[site], self._counts[site] = sequence, samples
        return []

    def implausible(self, site: str, samples: Samples) -> Refused:
        """What to raise for counts that no site can have."""
        return Refused(
            308,
            f"{site} announces {samples.train}, {samples.validation} and {samples.test} samples.",
            "check the site's data; a run may have ten million messages per site.",
        )

    def drop_site(self, site: str) -> list[Effect]:
        """Take a site off the run, tell it so, and judge what waited for it alone."""
        self.excluded[site] = sum(self.applied.values())
        effects: list[Effect] = [self._rejection(site, ANY, self._exclusion_notice(site))]
        for candidate in self.evaluation.exclude(site):
            effects += self.describe_candidate(candidate)
        return effects

    def figures(self, message: Message, due: bool) -> SiteMetrics:
        """The figures in a site's message: of held-out samples where they are due, else none; Refused 304 otherwise."""
        text, name = str(message.scalars["metrics"]), message.header.message_id
        if due:
            return decode_report(text, self.config.task, self.announced(message.header.sender), name)
        if text != NO_FIGURES:
            raise mismatch(f"{name} has figures where none are due.")
        return {}

    def announced(self, site: str) -> dict[str, int]:
        """How many samples of each part the site's hello has announced."""
        return self._counts[site]._asdict()

    def describe_candidate(self, candidate: int) -> list[Effect]:
        """Lines of metrics about a candidate that was judged."""
        entry = self.evaluation.of(candidate)
        assert entry is not None
        event: dict[str, Scalar] = {"event": "evaluate", "step": self.steps, "epoch": candidate}
        return [
            Record({**figures, **event, "site": site, "part": part})
            for site, metrics in [*entry["sites"].items(), ("overall", entry["overall"])]
            for part, figures in metrics.items()
        ]

    @property
    def progress(self) -> dict[str, int]:
        """In every answer: the best candidate so far, and the last one that was judged."""
        return {"best": self.evaluation.best, "judged": self.evaluation.judged}

    @property
    def summary(self) -> str:
        """In the farewell: the best candidate's figures over all sites, as JSON; it does not grow with their number."""
        best = self.evaluation.of(self.evaluation.best)
        return json.dumps(best and {"epoch": best["epoch"], "overall": best["overall"]}, sort_keys=True)

    def _manifest(self, site: str) -> Send:
        config = self.config
        return Send(site, Kind.MANIFEST, 0, scalars={"config": config.canonical(), "contract": config.digest})

    def _rejection(self, site: str, incarnation: str, problem: tuple[int, str]) -> Send:
        scalars: dict[str, Scalar] = {"incarnation": incarnation, "number": problem[0], "reason": problem[1]}
        return Send(site, Kind.REJECTED, 0, scalars=scalars)

    def _exclusion_notice(self, site: str) -> tuple[int, str]:
        hours = self.config.run.absence_hours
        return (608, f"it was silent for {hours:g} h, and the run went on without it")

    # -- snapshot ----------------------------------------------------------------------------------

    def snapshot(self, first_unconfirmed: int | None) -> Snapshot:
        """See `Role`; shapes add to it."""
        tensors = {**self.evaluation.tensors(), **flatten("best", self.best_weights)}
        facts: dict[str, Any] = {
            "digest": self.config.digest,
            "opened": self._opened, "ended": self._ended, "steps": self.steps, "applied": dict(self.applied),
            "released": dict(self._released), "refusals": dict(self.refusals),
            "greeted": {site: list(incarnations) for site, incarnations in self._greeted.items()},
            "counts": {site: list(samples) for site, samples in self._counts.items()},
            "excluded": dict(self.excluded),
            "batches": dict(self.batches), "samples": dict(self.samples),
            "evaluation": self.evaluation.facts(),
        }  # fmt: skip
        return Snapshot(tensors, facts)

    def restore(self, snapshot: Snapshot) -> None:
        """See `Role`; shapes add to it."""
        tensors, facts = snapshot.tensors, snapshot.facts
        check_digest(facts["digest"], self.config, self.name)
        self.evaluation.restore(tensors, facts["evaluation"])
        self.best_weights = under("best", tensors)
        self._opened, self._ended, self.steps = facts["opened"], facts["ended"], facts["steps"]
        self.applied, self._released = facts["applied"], facts["released"]
        self._greeted, self.excluded = facts["greeted"], facts["excluded"]
        self._counts = {site: Samples(*counts) for site, counts in facts["counts"].items()}
        self.sequences = {site: self.sequence_of(site, samples) for site, samples in self._counts.items()}
        self.refusals = Counter(facts["refusals"])
        self.batches, self.samples = Counter(facts["batches"]), Counter(facts["samples"])
