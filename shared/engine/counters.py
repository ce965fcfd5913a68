"""What an engine has done since it began and what holds it up: for `status`, for Prometheus, and in the log."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from logging import ERROR, WARNING

from nightsplit.shared.errors import Refused
from nightsplit.shared.log import event
from nightsplit.shared.wire.message import Header


@dataclass(slots=True)
class Counters:
    """Counts since this engine began, and the present state.

    Attributes:
        counts: messages `sent`, `confirmed`, `applied`, `duplicates`, `refused`; `checkpoints`;
            `sent_bytes` and `received_bytes`, headers included.
        trouble: what the link reported last, while it lasts.
    """

    counts: Counter[str] = field(default_factory=Counter)
    trouble: str | None = None

    def sent(self, body: Sequence[bytes | memoryview]) -> None:
        """A message was handed to the link."""
        self.counts["sent"] += 1
        self.counts["sent_bytes"] += sum(memoryview(piece).nbytes for piece in body)

    def received(self, body: bytes) -> None:
        """The link handed over a delivery."""
        self.counts["received_bytes"] += len(body)

    def skipped(self, checkpoints: Sequence[str]) -> None:
        """Damaged checkpoints were not used."""
        for line in checkpoints:
            event("checkpoint_skipped", WARNING, checkpoint=line)

    def blocked(self, reason: str) -> None:
        """The link cannot publish or receive for now."""
        self.trouble = reason
        event("blocked", WARNING, reason=reason)

    def recovered(self) -> None:
        """The link can again."""
        self.trouble = None
        event("recovered")

    def refused(self, sender: str, seq: int | None, refusal: Refused) -> None:
        """A message goes to the dead letter queue; its reason is there and not here, since it quotes the message."""
        self.counts["refused"] += 1
        event("refused", WARNING, number=refusal.number, sender=sender, seq=seq)

    def failed(self, header: Header, refusal: Refused) -> None:
        """The role failed on a message; the worker begins anew from its checkpoint."""
        event("role_failed", ERROR, number=refusal.number, message=header.message_id, reason=refusal.sentence)

    def excluded(self, site: str, position: int) -> None:
        """The run goes on without a site."""
        event("site_excluded", WARNING, site=site, position=position)
