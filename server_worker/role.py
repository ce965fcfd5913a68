"""Server's side of every protocol: it opens and ends the run, accepts sites and counts their contributions."""

import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from typing_extensions import override

from nightsplit.server_worker.evaluation import Evaluation
from nightsplit.server_worker.greeting import (
    HELLO_ANSWERS_MAX,
    INCARNATION_LENGTH_MAX,
    INCARNATIONS_MAX,
    RECEIPTS_MAX,
    REPEATS_MAX,
    LogHead,
    Samples,
)
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.engine.effects import Again, Effect, Expect, Finish, Record, Release, Send
from nightsplit.shared.engine.role import Role
from nightsplit.shared.errors import Refused, mismatch
from nightsplit.shared.protocols.handshake import check_digest, lacked, position
from nightsplit.shared.protocols.report import NO_FIGURES, SiteMetrics, decode_report
from nightsplit.shared.protocols.rounds import RoundSequence
from nightsplit.shared.protocols.stream import StreamSequence
from nightsplit.shared.storage.checkpoint import Snapshot, flatten, under
from nightsplit.shared.wire.message import SERVER, Kind, Message, Scalar
from nightsplit.shared.wire.schema import Contract, Payload

S = TypeVar("S", bound=StreamSequence | RoundSequence)
"""Messages that a site is going to send, derived from its hello."""


class ServerRole(Role, Generic[S]):
    """Base class of the server's roles: it accepts sites and evaluates every candidate for the best model."""

    rederives = False

    def __init__(self, config: RunConfig, contract: Contract) -> None:
        super().__init__(SERVER)
        self.config = config
        self.evaluation = Evaluation(config)
        self.best_weights: dict[str, torch.Tensor] = {}
        """Weights of the best candidate; empty before one was evaluated."""
        self.applied = dict.fromkeys(config.run.sites, 0)
        """Messages in sequence applied, per site."""
        self.refusals: Counter[str] = Counter()
        self.batches: Counter[str] = Counter()
        """Batches that the model was trained on, per site."""
        self.samples: Counter[str] = Counter()
        """Samples in these batches, per site."""
        self.outliers: dict[str, Counter[str]] = {site: Counter() for site in config.run.sites}
        """Outliers that were scaled down, per site and part of its messages."""
        self.sequences: dict[str, S] = {}
        self.steps = 0
        """Training steps of the server's weights."""
        self.version = 0
        """Number of times that the server has combined updates; 0 in protocols without rounds."""
        self._contract = contract
        self._opened = False
        self._ended = False
        self._counts: dict[str, Samples] = {}
        self.sent = dict.fromkeys(config.run.sites, 0)
        """Number of the last message in sequence to each site."""
        self._released = dict.fromkeys(config.run.sites, 0)
        """Number of answers that each site has announced as saved; later ones are kept for it."""
        self._repeats: Counter[str] = Counter()
        """Messages sent again to each site."""
        self._hello_answers: Counter[str] = Counter()
        self._receipts: Counter[str] = Counter()
        self._greeted: dict[str, list[str]] = {site: [] for site in config.run.sites}
        """Latest accepted incarnations of each site; earlier ones no longer run."""
        self._logs = dict.fromkeys(config.run.sites, LogHead())
        """Longest exit log that each site has announced."""
        self._logged = dict.fromkeys(config.run.sites, 0)
        """Number of each site's last message in its announced exit log."""
        self.cosign: Callable[[str, int, str], str] | None = None
        """Signs the head of a site's exit log: site, lines, head; None in a run without keys."""

    @abstractmethod
    def weights(self) -> dict[str, torch.Tensor]:
        """Return CPU copies of the server's current weights."""

    @abstractmethod
    def weights_in(self, snapshot: Snapshot) -> dict[str, torch.Tensor]:
        """Return the weights that were current when a snapshot was made."""

    @abstractmethod
    def sequence_of(self, site: str, samples: Samples) -> S:
        """Return the messages of a site with so many samples; Refused 308 when there are too many."""

    @abstractmethod
    def awaited(self) -> list[str]:
        """Return the sites that must send their next message before the run can go on, or end."""

    @abstractmethod
    def end_if_done(self) -> list[Effect]:
        """Return the effects of the end, if the last message of every active site was applied and its log is signed."""

    @abstractmethod
    def farewell(self) -> list[Send]:
        """Return the last messages to all active sites."""

    @override
    def payload(self, kind: Kind) -> Payload | None:
        return self._contract.get(kind)

    @override
    def start(self) -> list[Effect]:
        """Open the run at the first start, by sending its configuration as the first message to every site."""
        if self._ended:
            # A site that lacks an answer cannot ask for it any more.
            answers = [Again(site, self._kept(site, range(1, self.sent[site] + 1))) for site in self.active_sites]
            return [*answers, *self.end()]
        if self._opened:
            return []
        self._opened = True
        return [self._manifest(site) for site in self.config.run.sites]

    # -- for the worker ----------------------------------------------------------------------------

    @property
    def active_sites(self) -> dict[str, int]:
        """Messages in sequence applied, per active site."""
        # In the order of run.toml: a restored snapshot has its keys in alphabetical order.
        return {site: self.applied[site] for site in self.config.run.sites if site not in self.excluded}

    @property
    def may_close(self) -> bool:
        """True when `close` would let the run go on."""
        return False

    @property
    def done(self) -> bool:
        """True when the last message of every active site was applied."""
        last = {site: sequence.last for site, sequence in self.sequences.items()}
        return all(applied == last.get(site) for site, applied in self.active_sites.items())

    @property
    def unsigned(self) -> list[str]:
        """Sites whose exit log is not co-signed up to their last message; none in a run without keys."""
        if self.cosign is None:
            return []
        return [site for site, applied in self.active_sites.items() if self._logged[site] < applied]

    def contribution(self, site: str) -> dict[str, Scalar | None]:
        """Return a site's contribution to the training, and the position at which it was excluded, if it was."""
        return {
            "batches": self.batches[site], "samples": self.samples[site], "share": self.share(site),
            "excluded_at": self.excluded.get(site), "exit_log": self._logs[site].lines,
            "exit_log_head": self._logs[site].head or None,
        }  # fmt: skip

    def share(self, site: str) -> float:
        """Return the share of the training batches that came from a site, 0 to 1."""
        return self.batches[site] / max(1, self.batches.total())

    def outcome(self) -> dict[str, Any]:
        """Return further entries for the report."""
        return {}

    def publish(self, folder: Path) -> None:
        """Write further files of a finished run to its report folder."""

    def help(self) -> None:
        """Compute for the server in another process until it exits, in protocols with divisible work."""
        raise NotImplementedError

    # -- used by the shapes ------------------------------------------------------------------------

    def handle_hello(self, message: Message) -> list[Effect]:
        """Accept a site, or reject it with the reason; its `mark` is the last answer that it has applied."""
        site, hello = message.header.sender, message.scalars
        samples = Samples(int(hello["train"]), int(hello["validation"]), int(hello["test"]))
        log = LogHead(int(hello["log_lines"]), str(hello["log_head"]))
        incarnation, mark, released = str(hello["incarnation"]), int(hello["mark"]), int(hello["released"])
        sequence = self.sequence_of(site, samples)
        repeats, sent = self._read_position(message, sequence), int(hello["sent"])
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
            problem = 504, f"the site is at answer {mark}, but had stored {self._released[site]} before"
        elif hello["enrolled"] and incarnation not in self._greeted[site] and not self._may_follow(site, log):
            problem = 617, f"its exit log has {log.lines} lines, and had {self._logs[site].lines} before"
        if problem is not None or not hello["enrolled"]:
            if self._hello_answers[site] >= HELLO_ANSWERS_MAX:
                raise Refused(
                    308, f"{site} has had {self._hello_answers[site]} answers to hellos.", "look into its log."
                )
            self._hello_answers[site] += 1
            return [self._rejection(site, incarnation, problem) if problem else self._manifest(site)]
        # A hello may come again after a later one; only a new process may have lost its state.
        if incarnation not in self._greeted[site]:
            self._greeted[site] = [*self._greeted[site], incarnation][-INCARNATIONS_MAX:]
        self.sequences[site], self._counts[site] = sequence, samples
        if log.lines > self._logs[site].lines:
            self._logs[site] = log
        self._logged[site] = max(self._logged[site], sent)
        effects = [*self._release(site, released), *self._repeat(site, repeats), *self._receipt(site)]
        return [*effects, Expect(site, sent), *([] if self._ended else self.end_if_done())]

    def _read_position(self, message: Message, sequence: S) -> range:
        """Check the position of a site in a hello; return the numbers of the answers that it lacks and that were sent.

        Refused 304 if the position is impossible.
        """
        site, hello = message.header.sender, message.scalars
        mark, released, sent = (int(hello[name]) for name in ("mark", "released", "sent"))
        # A site that has not enrolled tells no samples yet, so its last answer is unknown.
        mark_max, sent_max = (sequence.last_answer, sequence.last) if hello["enrolled"] else (mark, 0)
        too_long = max(len(str(hello[name])) for name in ("incarnation", "log_head")) > INCARNATION_LENGTH_MAX
        if too_long or not 0 <= released <= mark <= mark_max or not 0 <= sent <= sent_max:
            stands = f"answer {mark}, {released} of them stored, and message {sent}"
            length = len(str(hello["incarnation"]))
            raise mismatch(f"{site} says hello at {stands}, with a name of {length} characters.")
        lacking = lacked(message, mark_max)
        return self._kept(site, range(max(lacking.start, mark + 1), min(lacking.stop, self.sent[site] + 1)))

    def _kept(self, site: str, seqs: range) -> range:
        """Return those of the numbers of which a message is kept for a site."""
        return range(max(seqs.start, self._released[site] + 1), seqs.stop)

    def _release(self, site: str, released: int) -> list[Effect]:
        """Keep no answer that a site has saved."""
        if released <= self._released[site]:
            return []
        self._released[site] = released
        return [Release(site, released)]

    def _repeat(self, site: str, seqs: range) -> list[Effect]:
        """Send answers again that a site lacks, unless it has asked for too many."""
        if not seqs or self._repeats[site] + len(seqs) > REPEATS_MAX + self.applied[site]:
            return []
        self._repeats[site] += len(seqs)
        return [Again(site, seqs)]

    @override
    def ask(self, sender: str, missing: range) -> list[Effect]:
        # Before its hello a site is unknown; and the hello tells how far it has sent.
        return self._receipt(sender, missing) if sender in self.sequences else []

    def _receipt(self, site: str, missing: range = range(0)) -> list[Effect]:
        """Tell a site how far the server has sent, and which messages it lacks."""
        if self._receipts[site] >= RECEIPTS_MAX + self.applied[site]:
            return []
        self._receipts[site] += 1
        return [Send(site, Kind.RECEIPT, 0, scalars=position(self.sent[site], missing)), *self._cosigned(site)]

    def _may_follow(self, site: str, log: LogHead) -> bool:
        """Return whether an exit log may be a later state of the one that was co-signed."""
        known = self._logs[site]
        return log.lines > known.lines or log == known

    def _cosigned(self, site: str) -> list[Effect]:
        known = self._logs[site]
        if self.cosign is None or not known.lines:
            return []
        signature = self.cosign(site, known.lines, known.head)
        scalars: dict[str, Scalar] = {"lines": known.lines, "head_signed": known.head, "signature": signature}
        return [Send(site, Kind.WITNESSED, 0, scalars=scalars)]

    def end(self) -> list[Effect]:
        """End the run, and send the farewell; repeated by a server that is started again."""
        self._ended = True
        if not self.best_weights:
            self.best_weights = self.weights()
        return [Finish(tuple(self.farewell()))]

    def too_many(self, site: str, samples: Samples) -> Refused:
        """Return the refusal of a site that announces too many samples."""
        sentence = f"{site} announces {samples.train}, {samples.validation} and {samples.test} samples."
        return Refused(308, sentence, "check the site's data; a run may have ten million messages per site.")

    def drop_site(self, site: str) -> list[Effect]:
        """Exclude a site, notify it, and complete the evaluations that waited only for it."""
        self.excluded[site] = sum(self.applied.values())
        effects: list[Effect] = []
        if site in self._counts:  # any other site is told in answer to its hello
            effects.append(Send(site, Kind.EXCLUDED, 0, scalars={"reason": self._exclusion_notice(site)[1]}))
        for candidate in self.evaluation.exclude(site):
            effects += self.describe_candidate(candidate)
        return effects

    def record_outliers(self, site: str, factors: Mapping[str, float]) -> list[Effect]:
        """Count outliers of a site, by the part of its messages, and return their metrics with their factors."""
        self.outliers[site].update(factors.keys())
        event: dict[str, Scalar] = {"event": "outlier", "step": self.steps, "site": site}
        return [Record({**event, "part": part, "factor": factor}) for part, factor in factors.items()]

    def read_figures(self, message: Message, due: bool) -> SiteMetrics:
        """Return the figures on held-out samples in a message; Refused 304 when they are due and absent, or reverse."""
        text, name = str(message.scalars["metrics"]), message.header.message_id
        if due:
            return decode_report(text, self.config.task, self.sample_counts(message.header.sender), name)
        if text != NO_FIGURES:
            raise mismatch(f"{name} has figures where none are due.")
        return {}

    def sample_counts(self, site: str) -> dict[str, int]:
        """Return the number of samples in each part, as announced by the site's hello."""
        return self._counts[site]._asdict()

    def describe_candidate(self, candidate: int) -> list[Effect]:
        """Return the metrics of an evaluated candidate."""
        entry = self.evaluation.entry(candidate)
        assert entry is not None
        event: dict[str, Scalar] = {"event": "evaluate", "step": self.steps, "epoch": candidate}
        return [
            Record({**figures, **event, "site": site, "part": part})
            for site, metrics in [*entry["sites"].items(), ("overall", entry["overall"])]
            for part, figures in metrics.items()
        ]

    @property
    def progress(self) -> dict[str, int]:
        """Scalars of every answer: the best candidate so far, and the last one that was evaluated."""
        return {"best": self.evaluation.best, "judged": self.evaluation.evaluated}

    @property
    def summary(self) -> str:
        """Scalar of the farewell: the best candidate's figures over all sites, as JSON of a fixed size."""
        best = self.evaluation.entry(self.evaluation.best)
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

    @override
    def snapshot(self, first_unconfirmed: int | None) -> Snapshot:
        tensors = {**self.evaluation.tensors(), **flatten("best", self.best_weights)}
        facts: dict[str, Any] = {
            "digest": self.config.digest,
            "opened": self._opened, "ended": self._ended, "steps": self.steps, "applied": dict(self.applied),
            "released": dict(self._released), "refusals": dict(self.refusals),
            "hello_answers": dict(self._hello_answers), "receipts": dict(self._receipts),
            "sent": dict(self.sent), "repeats": dict(self._repeats),
            "greeted": {site: list(incarnations) for site, incarnations in self._greeted.items()},
            "logs": {site: list(log) for site, log in self._logs.items()}, "logged": dict(self._logged),
            "counts": {site: list(samples) for site, samples in self._counts.items()},
            "excluded": dict(self.excluded),
            "batches": dict(self.batches), "samples": dict(self.samples),
            "outliers": {site: dict(parts) for site, parts in self.outliers.items()},
            "evaluation": self.evaluation.facts(),
        }  # fmt: skip
        return Snapshot(tensors, facts)

    @override
    def restore(self, snapshot: Snapshot) -> None:
        tensors, facts = snapshot.tensors, snapshot.facts
        check_digest(facts["digest"], self.config, self.name)
        self.evaluation.restore(tensors, facts["evaluation"])
        self.best_weights = under("best", tensors)
        self._opened, self._ended, self.steps = facts["opened"], facts["ended"], facts["steps"]
        self.applied, self._released = facts["applied"], facts["released"]
        self._hello_answers = Counter(facts.get("hello_answers", {}))  # earlier versions did not count them
        self.sent, self._repeats = facts.get("sent", self.sent), Counter(facts.get("repeats", {}))  # likewise
        self._receipts = Counter(facts.get("receipts", {}))
        self._greeted, self.excluded = facts["greeted"], facts["excluded"]
        logs = facts.get("logs", {})  # likewise
        self._logs = {site: LogHead(*logs.get(site, ())) for site in self.config.run.sites}
        self._logged |= facts.get("logged", {})
        self._counts = {site: Samples(*counts) for site, counts in facts["counts"].items()}
        self.sequences = {site: self.sequence_of(site, samples) for site, samples in self._counts.items()}
        self.refusals = Counter(facts["refusals"])
        self.batches, self.samples = Counter(facts["batches"]), Counter(facts["samples"])
        self.outliers = {site: Counter(parts) for site, parts in facts["outliers"].items()}
