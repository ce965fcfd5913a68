"""Counters of an engine and the state of its link, for `status`, Prometheus and the log."""

from collections import Counter
from dataclasses import dataclass, field
from logging import WARNING

from nightsplit.shared.errors import Refused
from nightsplit.shared.log import event


@dataclass(slots=True)
class Counters:
    """Counts since the start of this engine, and the state of its link.

    Attributes:
        counts: messages `sent`, `confirmed`, `applied`, `duplicates`, `refused`; `checkpoints`;
            `sent_bytes` and `received_bytes`, headers included.
        blocked_reason: reason why the link is blocked; None while it is not.
    """

    counts: Counter[str] = field(default_factory=Counter)
    blocked_reason: str | None = None

    def block(self, reason: str) -> None:
        """Note that the link cannot publish or receive for now."""
        self.blocked_reason = reason
        event("blocked", WARNING, reason=reason)

    def unblock(self) -> None:
        """Note that the link can publish and receive again."""
        self.blocked_reason = None
        event("recovered")

    def count_refused(self, sender: str, seq: int | None, refusal: Refused) -> None:
        """Count a refused message. The log has no reason, which quotes the message; the dead letter queue has it."""
        self.counts["refused"] += 1
        event("refused", WARNING, number=refusal.number, sender=sender, seq=seq)
