"""The site's side of every protocol: the handshake, the sequence numbers of its messages, the end of the run."""

import json
from abc import abstractmethod
from typing import Any, Protocol

import torch
from typing_extensions import override

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.engine.effects import Cosigned, Effect, Finish, Send, Spend
from nightsplit.shared.engine.role import Role
from nightsplit.shared.errors import TITLES, RunError, mismatch
from nightsplit.shared.protocols.handshake import check_digest
from nightsplit.shared.protocols.rounds import RoundSequence
from nightsplit.shared.protocols.stream import StreamSequence
from nightsplit.shared.storage.checkpoint import Snapshot
from nightsplit.shared.wire.message import SERVER, Kind, Message, Scalar
from nightsplit.shared.wire.schema import Contract, Payload

COSIGN_EVERY = 64
"""Messages after which a site has the server co-sign its exit log, at the next checkpoint."""


class Account(Protocol):
    """Entry of a run in the site's privacy ledger."""

    def pay(self, spend: Spend) -> None:
        """Record all steps so far as spent, durably, before weights that contain them leave the site."""

    def close(self) -> None:
        """Close the ledger."""


class Log(Protocol):
    """Exit log of the site."""

    def synced_head(self) -> tuple[int, str]:
        """Return the number of its lines and the head of its chain, both durable."""


class SiteRole(Role):
    """Role that says hello, and enrols if the server's run.toml is the site's own.

    `incarnation` is the id of this process; a rejection of an earlier one is ignored.
    """

    rederives = True
    sequence: StreamSequence | RoundSequence
    """All messages of the site."""

    def __init__(self, name: str, config: RunConfig, contract: Contract, incarnation: str) -> None:
        super().__init__(name)
        self.config = config
        self.next_seq = 1
        """Number of the next message to send."""
        self.answered = 0
        """Number of the server's last message in sequence."""
        self.finished = False
        self.account: Account | None = None
        """Account of a run with differential privacy."""
        self.exit_log: Log | None = None
        """Log whose head the server co-signs; None where nothing is logged."""
        self.best = 0
        """Best epoch by the server's last message."""
        self._evaluated = 0
        """Last epoch that the server has evaluated, by its last message."""
        self._contract = contract
        self._incarnation = incarnation
        self._enrolled = False
        self._released = 0
        """Answers that the broker may have dropped: a site that restores fewer has lost its state."""
        self._told_seq = 1
        """Number of the next message when the site said its last hello."""
        self._in_snapshot = 0
        """Answers in the newest snapshot; the broker may drop them when it is saved."""

    @property
    @abstractmethod
    def samples(self) -> tuple[int, int, int]:
        """Numbers of training, validation and test samples."""

    @abstractmethod
    def on_answer(self, message: Message) -> list[Effect]:
        """Apply the next message in the server's sequence; raises as `Role.on`."""

    @abstractmethod
    def model(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return the site's parts of the best model at the end of the run: weights by part and name."""

    @override
    def payload(self, kind: Kind) -> Payload | None:
        return self._contract.get(kind)

    @override
    def start(self) -> list[Effect]:
        # The server replies with the manifest until the site has enrolled.
        return [Finish()] if self.finished else [self._hello()]

    @property
    def at_work(self) -> bool:
        """True while the site is enrolled and the run is not over."""
        return self._enrolled and not self.finished

    @override
    def on(self, message: Message) -> list[Effect]:
        kind, scalars = message.header.kind, message.scalars
        if kind is Kind.MANIFEST:
            return self._enrol(str(scalars["config"]), str(scalars["contract"]))
        if kind is Kind.REJECTED:
            if scalars["incarnation"] != self._incarnation:
                return []
            number = int(scalars["number"])
            if number not in TITLES:
                raise mismatch(f"it rejects with number {number}.")
            raise self._rejected(number, str(scalars["reason"]))
        if kind is Kind.WITNESSED:
            return [Cosigned(scalars)]
        if kind is Kind.EXCLUDED:
            raise self._rejected(608, str(scalars["reason"]))
        return self.on_answer(message)

    def _rejected(self, number: int, reason: str) -> RunError:
        remedy = "ask the server's side, then start the site again."
        return RunError(number, f"the server rejects {self.name}: {reason}.", remedy)

    # -- for subclasses ----------------------------------------------------------------------------

    def is_candidate(self, epoch: int) -> bool:
        """Return whether an epoch is the best so far, or not evaluated yet."""
        return epoch > self._evaluated or epoch == self.best

    def record_answer(self, seq: int, evaluated: int) -> None:
        """Count an answer, and the last evaluated epoch that it names."""
        self.answered, self._evaluated = seq, max(evaluated, self._evaluated)

    def _enrol(self, config: str, digest: str) -> list[Effect]:
        """Compare run.toml with the server's, before any patient data is sent."""
        if digest != self.config.digest:
            differences = _describe_difference(config, self.config.canonical())
            remedy = "agree on one run.toml. Nothing of a patient was sent."
            raise RunError(601, f"{self.name} and the server have different run.toml files: {differences}.", remedy)
        if self._enrolled:
            return []
        self._enrolled = True
        return [self._hello()]

    def _hello(self) -> Send:
        # Not even the numbers of samples leave before site and server agree on the run.
        train, validation, test = self.samples if self._enrolled else (0, 0, 0)
        lines, head = self.exit_log.synced_head() if self.exit_log is not None and self._enrolled else (0, "")
        self._told_seq = self.next_seq
        scalars: dict[str, Scalar] = {
            "incarnation": self._incarnation, "contract": self.config.digest, "enrolled": self._enrolled,
            "train": train, "validation": validation, "test": test,
            "mark": self.answered, "released": self._released, "log_lines": lines, "log_head": head,
            "sent": self.next_seq - 1 if self._enrolled else 0,
        }  # fmt: skip
        return Send(SERVER, Kind.HELLO, 0, scalars=scalars)

    @override
    def saved(self) -> list[Effect]:
        # The server must know before the broker drops the first answer; and co-signs the exit log now and then.
        if not self._released and self._in_snapshot:
            self._released = self._in_snapshot
            return [self._hello()]
        is_due = self.exit_log is not None and self.next_seq - self._told_seq >= COSIGN_EVERY
        return [self._hello()] if is_due and self.at_work else []

    def tell_all_sent(self) -> list[Effect]:
        """Say hello after the last message, once, so that the server co-signs the exit log to its end."""
        return [self._hello()] if self.exit_log is not None and self._told_seq < self.next_seq else []

    def resume_seq(self, first_unconfirmed: int | None) -> int:
        """Return the number of the first message to send after a restore."""
        return min(first_unconfirmed or self.next_seq, self.next_seq)

    @override
    def snapshot(self, first_unconfirmed: int | None) -> Snapshot:
        self._in_snapshot = self.answered
        facts: dict[str, Any] = {
            "digest": self.config.digest, "next": self.resume_seq(first_unconfirmed), "answered": self.answered,
            "finished": self.finished, "enrolled": self._enrolled, "released": self._released,
            "best": self.best, "judged": self._evaluated,
        }  # fmt: skip
        return Snapshot({}, facts)

    @override
    def restore(self, snapshot: Snapshot) -> None:
        facts = snapshot.facts
        check_digest(facts["digest"], self.config, self.name)
        self.next_seq, self.answered = facts["next"], facts["answered"]
        self.best, self._evaluated = facts["best"], facts["judged"]
        self.finished, self._enrolled, self._released = facts["finished"], facts["enrolled"], facts["released"]


def _describe_difference(theirs: str, ours: str) -> str:
    """List the keys in which two canonical configurations differ; a missing section is null there."""

    def lines(text: str) -> dict[str, None]:
        content = json.loads(text)
        settings = ((name, key, value) for name, keys in content.items() for key, value in (keys or {}).items())
        return dict.fromkeys(f"{name}.{key} = {value!r:.80}" for name, key, value in settings)

    try:
        server, here = lines(theirs), lines(ours)
    except (ValueError, AttributeError, RecursionError):
        return "the server's cannot be read"
    changed = [f"server {line}" for line in server if line not in here]
    changed += [f"here {line}" for line in here if line not in server]
    return "; ".join(sorted(changed, key=lambda line: line.partition(" ")[2])[:6])  # both values of a key in a row
