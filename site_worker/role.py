"""What the site's side of every system does: it agrees to the run, numbers what it sends, and ends."""

import json
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.engine.effects import Effect, Finish, Send, Spend
from nightsplit.shared.engine.role import Role
from nightsplit.shared.errors import TITLES, RunError, mismatch
from nightsplit.shared.protocols.handshake import ANY, check_digest
from nightsplit.shared.storage.checkpoint import Snapshot
from nightsplit.shared.wire.message import SERVER, Kind, Message, Scalar
from nightsplit.shared.wire.schema import Payload


class Account(Protocol):
    """A run's line in the site's ledger, as `nightsplit.site_worker.privacy.site.Account` keeps it."""

    def pay(self, spend: Spend) -> None:
        """Pay for all steps so far, durably, before weights that contain them leave."""

    def close(self) -> None:
        """Let go of the ledger."""


class SiteRole(Role):
    """Says hello, and enrols when the server's run is the one that this site knows.

    Args:
        name: the site.
        config: the run, as the site's own run.toml has it.
        contract: payload of each kind.
        incarnation: of this process; a rejection of an earlier one is ignored.
    """

    rederives = True

    def __init__(self, name: str, config: RunConfig, contract: Mapping[Kind, Payload], incarnation: str) -> None:
        super().__init__(name)
        self.config = config
        self.next_seq = 1
        """The next message to send."""
        self.answered = 0
        """Messages in sequence that came from the server."""
        self.finished = False
        self.account: Account | None = None
        """Of a run with differential privacy."""
        self.best = 0
        """The best epoch, as far as the server has told."""
        self._judged = 0
        """The last epoch that the server has judged, as far as it has told."""
        self._contract = contract
        self._incarnation = incarnation
        self._enrolled = False
        self._released = 0
        """Answers that the broker may have forgotten: a state that holds fewer was lost."""
        self._in_snapshot = 0

    # -- what a shape fills in -------------------------------------------------------------------

    @property
    @abstractmethod
    def planned(self) -> int:
        """Messages that the site is going to send; an upper bound where that depends on others."""

    @property
    @abstractmethod
    def samples(self) -> tuple[int, int, int]:
        """FloatArray of training, validation and test samples."""

    @abstractmethod
    def answer(self, message: Message) -> list[Effect]:
        """Apply the next message in the server's sequence; raises as `Role.on`."""

    @abstractmethod
    def model(self) -> dict[str, dict[str, torch.Tensor]]:
        """The parts of the best model that the site has at the end: name to weights."""

    # -- Role ------------------------------------------------------------------------------------

    def payload(self, kind: Kind) -> Payload | None:
        """See `Role`."""
        return self._contract.get(kind)

    def start(self) -> list[Effect]:
        """Say hello. To a site that has not seen the run's manifest, the server answers with it."""
        return [Finish()] if self.finished else [self._hello()]

    @property
    def at_work(self) -> bool:
        """Whether the run is agreed on and not over."""
        return self._enrolled and not self.finished

    def on(self, message: Message) -> list[Effect]:
        """See `Role`."""
        kind, scalars = message.header.kind, message.scalars
        if kind is Kind.MANIFEST:
            return self._enrol(str(scalars["config"]), str(scalars["contract"]))
        if kind is Kind.REJECTED:
            if scalars["incarnation"] not in (ANY, self._incarnation):
                return []
            number, reason = int(scalars["number"]), str(scalars["reason"])
            if number not in TITLES:
                raise mismatch(f"it rejects with number {number}.")
            raise RunError(number, f"the server rejects {self.name}: {reason}.", f"see: nightsplit explain {number}.")
        return self.answer(message)

    # -- parts that shapes use -------------------------------------------------------------------

    def open_candidate(self, epoch: int) -> bool:
        """Whether an epoch is the best, or may still turn out to be."""
        return epoch > self._judged or epoch == self.best

    def record_answer(self, seq: int, judged: int) -> None:
        """Count an answer, and the verdict that came with it."""
        self.answered, self._judged = seq, max(judged, self._judged)

    def _enrol(self, config: str, contract: str) -> list[Effect]:
        """Agree to the run as the server opened it, before anything of a patient is sent."""
        if contract != self.config.digest:
            differences = _difference(config, self.config.canonical())
            remedy = "agree on one run.toml. Nothing of a patient was sent."
            raise RunError(601, f"{self.name} and the server have different run.toml files: {differences}.", remedy)
        if self._enrolled:
            return []
        self._enrolled = True
        return [self._hello()]

    def _hello(self) -> Send:
        # Not even the numbers of patients' samples leave before site and server agree on the run.
        train, validation, test = self.samples if self._enrolled else (0, 0, 0)
        scalars: dict[str, Scalar] = {
            "incarnation": self._incarnation, "contract": self.config.digest, "enrolled": self._enrolled,
            "train": train, "validation": validation, "test": test,
            "mark": self.answered, "released": self._released,
        }  # fmt: skip
        return Send(SERVER, Kind.HELLO, 0, scalars=scalars)

    def saved(self) -> list[Effect]:
        """See `Role`: before the broker forgets its first answer, the server hears that it may."""
        if self._released or not self._in_snapshot:
            return []
        self._released = self._in_snapshot
        return [self._hello()]

    # -- snapshot ----------------------------------------------------------------------------------

    def resume(self, first_unconfirmed: int | None) -> int:
        """The message to go on with after a restore."""
        return min(first_unconfirmed or self.next_seq, self.next_seq)

    def snapshot(self, first_unconfirmed: int | None) -> Snapshot:
        """See `Role`; shapes add to it."""
        self._in_snapshot = self.answered
        facts: dict[str, Any] = {
            "digest": self.config.digest, "next": self.resume(first_unconfirmed), "answered": self.answered,
            "finished": self.finished, "enrolled": self._enrolled, "released": self._released,
            "best": self.best, "judged": self._judged,
        }  # fmt: skip
        return Snapshot({}, facts)

    def restore(self, snapshot: Snapshot) -> None:
        """See `Role`; shapes add to it."""
        facts = snapshot.facts
        check_digest(facts["digest"], self.config, self.name)
        self.next_seq, self.answered = facts["next"], facts["answered"]
        self.best, self._judged = facts["best"], facts["judged"]
        self.finished, self._enrolled, self._released = facts["finished"], facts["enrolled"], facts["released"]


def _difference(theirs: str, ours: str) -> str:
    """Keys in which two canonical configurations differ; a section that a run does without is null there."""

    def lines(text: str) -> dict[str, None]:
        content = json.loads(text)
        return dict.fromkeys(f"{s}.{k} = {v!r:.80}" for s, keys in content.items() for k, v in (keys or {}).items())

    try:
        server, here = lines(theirs), lines(ours)
    except (ValueError, AttributeError, RecursionError):
        return "the server's cannot be read here"
    changed = [f"server {line}" for line in server if line not in here]
    changed += [f"here {line}" for line in here if line not in server]
    return "; ".join(sorted(changed, key=lambda line: line.partition(" ")[2])[:6])
