"""Role, which the engine runs: it decides and never acts.

A role opens no socket, file or clock, and starts no thread: it takes messages and returns
effects, so that a test compares lists of effects and needs no mock. Its snapshot holds all of its
state. The shapes of a role (stream, rounds) are base classes beside the protocols:
`nightsplit.site_worker.stream.role` and `nightsplit.server_worker.stream.role`.
"""

from abc import ABC, abstractmethod
from collections.abc import Set
from typing import ClassVar

from nightsplit.shared.engine.effects import Effect, Send
from nightsplit.shared.errors import Refused
from nightsplit.shared.storage.checkpoint import Snapshot
from nightsplit.shared.wire.message import Header, Kind, Message
from nightsplit.shared.wire.schema import Payload


class Role(ABC):
    """One side of a protocol.

    Attributes:
        name: site name, or `SERVER`.
        rederives: whether unconfirmed sends can be made again from the snapshot, so that it can be
            written at once. Otherwise it is written when its sends are confirmed.
        journalled: whether the order between senders depends on timing and must be journalled.
        excluded: excluded senders, with the number of messages applied before.
        busy: whether the role has work, by `next`, that comes before every further message.
    """

    rederives: ClassVar[bool]

    def __init__(self, name: str) -> None:
        self.name = name
        self.journalled = False
        self.excluded: dict[str, int] = {}

    @property
    def busy(self) -> bool:
        """Return False, as of a role that applies each message at once."""
        return False

    @abstractmethod
    def payload(self, kind: Kind) -> Payload | None:
        """Return the payload of a kind of message; None for a kind that this protocol does not use."""

    @abstractmethod
    def start(self) -> list[Effect]:
        """Begin; called once in every process, after `restore` if there is a checkpoint."""

    def next(self) -> list[Effect]:
        """Return the effects of further work that needs no message; none if the role waits."""
        return []

    def choose(self, ready: Set[str]) -> str | None:
        """Return the sender whose next message is applied; None to wait for one that is not `ready`."""
        return min(ready, default=None)

    @abstractmethod
    def on(self, message: Message) -> list[Effect]:
        """Apply a message: the next in its sender's sequence, or an unsequenced one.

        Raises:
            Refused: it cannot be applied; the role is unchanged.
            RunError: the run cannot go on.
        """

    @abstractmethod
    def refused(self, header: Header, refusal: Refused) -> list[Effect]:
        """Count a refused message of a sequence as applied."""

    def ask(self, sender: str, missing: range) -> list[Effect]:
        """Ask a sender for messages that were lost, by number; it has sent later ones, or has said so."""
        return []

    def repeat(self, seq: int) -> Send | None:
        """Make a message again that was sent, in a role that rederives; None if its receiver has answered it."""
        raise NotImplementedError

    def remind(self) -> list[Effect]:
        """React to a long time without work."""
        return []

    def exclude(self, sender: str) -> list[Effect]:
        """Add a sender to `excluded`; no message of it is applied any more."""
        raise NotImplementedError

    def close(self) -> list[Effect]:
        """Close the round without waiting for further reports."""
        raise NotImplementedError

    @abstractmethod
    def snapshot(self, first_unconfirmed: int | None) -> Snapshot:
        """Return all state, in tensors that later work does not change.

        Args:
            first_unconfirmed: lowest unconfirmed seq; None if there is none. A role that rederives
                continues from there after a restore.
        """

    def saved(self) -> list[Effect]:
        """React to the last snapshot, which is durable now; its inputs are acknowledged after the next one."""
        return []

    @abstractmethod
    def restore(self, snapshot: Snapshot) -> None:
        """Continue from a snapshot."""
