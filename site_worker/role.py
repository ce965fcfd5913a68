"""The site's side of every protocol: the handshake, the numbers of its messages, lost ones, the end of the run.

    hello     sent: "I have sent messages up to 7"      missing: "I lack your answers 3 to 5"       released
    receipt   sent: "I have sent answers up to 5"       missing: "I lack your messages 4 to 7"      (server)

Queues keep the order. So the reader of either one has received all that its sender had sent before, or it was lost.
"""

import json
from abc import abstractmethod
from typing import Any, Protocol

import torch
from typing_extensions import override

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.engine.effects import Again, Cosigned, Effect, Expect, Finish, Send, Spend
from nightsplit.shared.engine.role import Role
from nightsplit.shared.errors import TITLES, RunError, mismatch
from nightsplit.shared.protocols.handshake import check_digest, lacked, position
from nightsplit.shared.protocols.rounds import RoundSequence
from nightsplit.shared.protocols.stream import StreamSequence
from nightsplit.shared.storage.checkpoint import Snapshot
from nightsplit.shared.wire.message import SERVER, Kind, Message, Scalar
from nightsplit.shared.wire.schema import Contract, Payload

HELLO_EVERY = 64
"""Messages after which a site says hello again, at the next checkpoint: the server co-signs its exit log, and need not
keep the answers that the site has saved."""
REMINDERS_MAX = 24
"""Hellos of a site that waits, without an answer to any of them: a server may be off for long."""
REPEATS_MAX = 1000
"""Messages that a site sends again, besides one for each that it has sent."""


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
        """Answers in all kept checkpoints: a site that restores fewer than it has told has lost its state."""
        self._saved = 0
        """Answers in the newest checkpoint."""
        self._in_snapshot = 0
        """Answers in the newest snapshot."""
        self._told_seq = 1
        """Number of the next message when the site said its last hello."""
        self._asked = 0
        """Highest answer that the site has asked for since it was last reminded; others were asked for before it."""
        self._reminders = 0
        """Reminders since the last message of the server."""
        self._repeats = 0
        """Messages sent again for the server."""

    @property
    @abstractmethod
    def samples(self) -> tuple[int, int, int]:
        """Numbers of training, validation and test samples."""

    @abstractmethod
    def on_answer(self, message: Message) -> list[Effect]:
        """Apply the next message in the server's sequence; raises as `Role.on`."""

    @abstractmethod
    def message(self, seq: int) -> Send:
        """Return message `seq`, which was not answered yet; the same every time."""

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
        self._reminders = 0
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
        if kind is Kind.RECEIPT:
            return self._read_receipt(message)
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

    @override
    def ask(self, sender: str, missing: range) -> list[Effect]:
        # Later holes are asked for at once; the same ones only when the next reminder is due.
        if not self.at_work or missing[-1] <= self._asked:
            return []
        self._asked = missing[-1]
        return [self._hello(missing)]

    @override
    def remind(self) -> list[Effect]:
        if self.finished or self._reminders >= REMINDERS_MAX:
            return []
        self._reminders += 1
        self._asked = 0
        return [self._hello()]

    def _read_receipt(self, receipt: Message) -> list[Effect]:
        """Send again the messages that the server lacks, and find out which of its own were lost."""
        sent = int(receipt.scalars["sent"])
        if sent > self.sequence.last_answer:
            raise mismatch(f"{receipt.header.message_id} counts {sent} of {self.sequence.last_answer} messages.")
        missing = lacked(receipt, self.sequence.last)
        # A receipt may come again after messages that it asks for; those not sent yet come by themselves.
        seqs = range(max(missing.start, self.answered + 1), min(missing.stop, self.next_seq)) if missing else missing
        if not seqs or self._repeats + len(seqs) > REPEATS_MAX + self.next_seq:
            return [Expect(SERVER, sent)]
        self._repeats += len(seqs)
        return [Again(SERVER, seqs), Expect(SERVER, sent)]

    @override
    def repeat(self, seq: int) -> Send | None:
        return self.message(seq) if self.answered < seq < self.next_seq and not self.finished else None

    def _hello(self, missing: range = range(0)) -> Send:
        # Not even the numbers of samples leave before site and server agree on the run.
        train, validation, test = self.samples if self._enrolled else (0, 0, 0)
        lines, head = self.exit_log.synced_head() if self.exit_log is not None and self._enrolled else (0, "")
        self._told_seq = self.next_seq
        scalars: dict[str, Scalar] = {
            "incarnation": self._incarnation, "contract": self.config.digest, "enrolled": self._enrolled,
            "train": train, "validation": validation, "test": test,
            "mark": self.answered, "released": self._released, "log_lines": lines, "log_head": head,
            **position(self.next_seq - 1 if self._enrolled else 0, missing),
        }  # fmt: skip
        return Send(SERVER, Kind.HELLO, 0, scalars=scalars)

    @override
    def saved(self) -> list[Effect]:
        self._released, self._saved = self._saved, self._in_snapshot  # two checkpoints are kept
        return [self._hello()] if self.next_seq - self._told_seq >= self.hello_every and self.at_work else []

    def tell_all_sent(self) -> list[Effect]:
        """Say hello after the last message, once, so that the server co-signs the exit log to its end."""
        return [self._hello()] if self.exit_log is not None and self._told_seq < self.next_seq else []

    @property
    def hello_every(self) -> int:
        """Number of messages between two hellos."""
        return HELLO_EVERY

    def oldest_seq(self, first_unconfirmed: int | None) -> int:
        """Return the number of the oldest message that may have to be made again.

        After a restore the site sends from the first unconfirmed message on; the server may lack those that it has not
        answered.
        """
        return min(self._resume_seq(first_unconfirmed), self.answered + 1)

    def _resume_seq(self, first_unconfirmed: int | None) -> int:
        """Return the number of the first message to send after a restore."""
        return min(first_unconfirmed or self.next_seq, self.next_seq)

    @override
    def snapshot(self, first_unconfirmed: int | None) -> Snapshot:
        self._in_snapshot = self.answered
        facts: dict[str, Any] = {
            "digest": self.config.digest, "next": self._resume_seq(first_unconfirmed), "answered": self.answered,
            "finished": self.finished, "enrolled": self._enrolled, "released": self._released,
            "best": self.best, "judged": self._evaluated, "repeats": self._repeats,
        }  # fmt: skip
        return Snapshot({}, facts)

    @override
    def restore(self, snapshot: Snapshot) -> None:
        facts = snapshot.facts
        check_digest(facts["digest"], self.config, self.name)
        self.next_seq, self.answered = facts["next"], facts["answered"]
        self.best, self._evaluated = facts["best"], facts["judged"]
        self.finished, self._enrolled, self._released = facts["finished"], facts["enrolled"], facts["released"]
        self._saved, self._repeats = self.answered, facts.get("repeats", 0)  # earlier versions did not count them


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
