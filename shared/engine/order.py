"""Whose message is applied next: the role's choice, written down first where it depends on timing."""

from __future__ import annotations

from collections.abc import Callable, Set

from nightsplit.shared.engine.fencing import Authority
from nightsplit.shared.engine.role import Role

LEAVES = "-"
"""Before a name in the journal: at this position the run began to go on without that sender."""
CLOSES = "."
"""In the journal: at this position the role was told to wait no longer for what had not come."""


class Turns:
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
        decide: asked when nothing can be applied; gives `LEAVES` and a name, `CLOSES`, or None to wait on.
    """

    def __init__(self, role: Role, authority: Authority, decide: Callable[[], str | None]) -> None:
        self._role = role
        self._authority = authority
        self._decide = decide
        self._replaying = True
        """The journal may hold entries beyond the checkpoint."""
        self._written: tuple[int, str] | None = None
        """Position and entry that the journal named last."""

    def choose(self, position: int, ready: Set[str]) -> str | None:
        """Whose message is applied at `position`, among senders whose next message is here; None to wait.

        Or an entry that was decided upon.
        """
        if not self._role.journalled:
            return self._role.choose(ready)
        if self._written is None or self._written[0] != position:
            self._written = self._entry(position, ready)
        turn = self._written[1] if self._written is not None else None
        if turn is None or turn == CLOSES or turn.startswith(LEAVES):
            return turn
        # The role has a say in what the journal names: the message may be here before its sender's hello.
        return self._role.choose(ready & {turn})

    def _entry(self, position: int, ready: Set[str]) -> tuple[int, str] | None:
        """What the journal says about `position`, after the role's choice was written into it if need be."""
        if self._replaying:
            sender = self._authority.journalled(position)
            if sender is not None:
                return position, sender
            self._replaying = False
        chosen = self._role.choose(ready) or self._decide()
        return None if chosen is None else (position, self._authority.journal(position, chosen))
