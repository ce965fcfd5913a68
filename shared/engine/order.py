"""The order in which messages of several senders are applied: the role's choice, written down where timing decides."""

from collections.abc import Callable, Set
from dataclasses import dataclass

from nightsplit.shared.engine.fencing import CheckpointAuthority
from nightsplit.shared.engine.role import Role


@dataclass(frozen=True, slots=True)
class Apply:
    """The next message of a sender is applied."""

    sender: str


@dataclass(frozen=True, slots=True)
class Exclude:
    """The run goes on without a sender."""

    sender: str


@dataclass(frozen=True, slots=True)
class CloseRound:
    """The role waits no longer for what has not come."""


OrderEntry = Apply | Exclude | CloseRound

_EXCLUDES, _CLOSES = "-", "."


def to_journal(entry: OrderEntry) -> str:
    """Spell an entry as the run store keeps it."""
    match entry:
        case Apply(sender):
            return sender
        case Exclude(sender):
            return _EXCLUDES + sender
        case CloseRound():
            return _CLOSES


def from_journal(text: str) -> OrderEntry:
    """Read an entry; a site's name begins with neither sign."""
    if text == _CLOSES:
        return CloseRound()
    return Exclude(text.removeprefix(_EXCLUDES)) if text.startswith(_EXCLUDES) else Apply(text)


class DeliveryOrder:
    """Asks the role, and the journal before it where the role keeps one.

        position     1    2    3    4    5
        journal      A    B    -C   .    .       a restart from position 1 follows it over 2 and 3:
        checkpoint   x                           whoever it names is waited for; from 4 on the role chooses

    An entry is durable before the message is applied, so before anything that depends on it leaves.
    That the run goes on without C is an entry like any other: it is decided once, whoever decides, and
    every restart, successor and replay meets it at the same place. So is that a round closes.

    Args:
        role: chooses.
        authority: keeps the journal.
        decide: asked when nothing can be applied; None to wait on.
    """

    def __init__(self, role: Role, authority: CheckpointAuthority, decide: Callable[[], OrderEntry | None]) -> None:
        self._role = role
        self._authority = authority
        self._decide = decide
        self._replaying = True
        """The journal may hold entries beyond the checkpoint."""
        self._written: tuple[int, OrderEntry] | None = None
        """Position and entry that the journal named last."""

    def choose(self, position: int, ready: Set[str]) -> OrderEntry | None:
        """Choose what happens at `position`; None to wait.

        Args:
            position: of the next entry.
            ready: senders whose next message is here.
        """
        if not self._role.journalled:
            return self._choice(ready)
        if self._written is None or self._written[0] != position:
            self._written = self._entry(position, ready)
        entry = self._written[1] if self._written is not None else None
        # The role has a say in what the journal names: the message may be here before its sender's hello.
        return self._choice(ready & {entry.sender}) if isinstance(entry, Apply) else entry

    def _choice(self, ready: Set[str]) -> Apply | None:
        sender = self._role.choose(ready)
        return None if sender is None else Apply(sender)

    def _entry(self, position: int, ready: Set[str]) -> tuple[int, OrderEntry] | None:
        """The journal's entry at `position`, after the choice was written into it if need be."""
        if self._replaying:
            known = self._authority.journalled(position)
            if known is not None:
                return position, from_journal(known)
            self._replaying = False
        chosen = self._choice(ready) or self._decide()
        if chosen is None:
            return None
        return position, from_journal(self._authority.journal(position, to_journal(chosen)))
