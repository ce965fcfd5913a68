"""Order in which messages of several senders are applied: the role's choice, journalled where timing decides."""

from collections.abc import Callable, Set
from dataclasses import dataclass

from nightsplit.shared.engine.fencing import CheckpointAuthority
from nightsplit.shared.engine.role import Role


@dataclass(frozen=True, slots=True)
class Apply:
    """Entry: apply the next message of a sender."""

    sender: str


@dataclass(frozen=True, slots=True)
class Exclude:
    """Entry: continue the run without a sender."""

    sender: str


@dataclass(frozen=True, slots=True)
class CloseRound:
    """Entry: close the round without the reports that have not come."""


OrderEntry = Apply | Exclude | CloseRound

_EXCLUDE, _CLOSE = "-", "."


def to_journal(entry: OrderEntry) -> str:
    """Encode an entry for the run store."""
    match entry:
        case Apply(sender):
            return sender
        case Exclude(sender):
            return _EXCLUDE + sender
        case CloseRound():
            return _CLOSE


def from_journal(text: str) -> OrderEntry:
    """Decode an entry; a site's name starts with neither sign."""
    if text == _CLOSE:
        return CloseRound()
    return Exclude(text.removeprefix(_EXCLUDE)) if text.startswith(_EXCLUDE) else Apply(text)


class DeliveryOrder:
    """Order of entries: from the journal, if the role keeps one, and beyond its end by the role's choice.

        position     1    2    3    4    5
        journal      A    B    -C   .    .       a restart from position 1 follows it over 2 and 3, and
        checkpoint   x                           waits for the senders it names; from 4 on the role chooses

    An entry is durable before its message is applied, hence before any message that depends on it leaves.
    The exclusion of C and the close of a round are entries like any other: decided once, and found at the
    same position by every restart, successor and replay.

    `decide` is called when no message can be applied, and returns None to wait.
    """

    def __init__(self, role: Role, authority: CheckpointAuthority, decide: Callable[[], OrderEntry | None]) -> None:
        self._role = role
        self._authority = authority
        self._decide = decide
        self._replaying = True
        """True while the journal may hold entries beyond the checkpoint."""
        self._latest: tuple[int, OrderEntry] | None = None
        """Position and content of the latest journal entry."""

    def choose(self, position: int, ready: Set[str]) -> OrderEntry | None:
        """Return the entry at `position`, given the senders with a message `ready`; None to wait."""
        if not self._role.journalled:
            return self._choice(ready)
        if self._latest is None or self._latest[0] != position:
            self._latest = self._entry(position, ready)
        entry = self._latest[1] if self._latest is not None else None
        # The role must agree with the journal: the message may have arrived before its sender's hello.
        return self._choice(ready & {entry.sender}) if isinstance(entry, Apply) else entry

    def _choice(self, ready: Set[str]) -> Apply | None:
        sender = self._role.choose(ready)
        return None if sender is None else Apply(sender)

    def _entry(self, position: int, ready: Set[str]) -> tuple[int, OrderEntry] | None:
        """Return the journal's entry at `position`; choose and write it if the journal ends before."""
        if self._replaying:
            entry = self._authority.journal_entry(position)
            if entry is not None:
                return position, from_journal(entry)
            self._replaying = False
        choice = self._choice(ready) or self._decide()
        if choice is None:
            return None
        return position, from_journal(self._authority.claim_position(position, to_journal(choice)))
