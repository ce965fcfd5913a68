"""What the engine runs: a role, which decides and never acts.

A role opens no socket, file or clock, and starts no thread: it takes messages and returns
effects, so a test compares lists of effects and needs no mock. Everything it must remember is in
its snapshot. The shapes of a role (stream, rounds) are base classes beside the systems:
`nightsplit.site_worker.stream.role` and `nightsplit.server_worker.stream.role`.
"""

from abc import ABC, abstractmethod
from collections.abc import Set
from typing import ClassVar

from nightsplit.shared.engine.effects import Effect
from nightsplit.shared.errors import Refused
from nightsplit.shared.storage.checkpoint import Snapshot
from nightsplit.shared.wire.message import Header, Kind, Message
from nightsplit.shared.wire.schema import Payload


class Role(ABC):
    """One side of a system.

    Attributes:
        name: site name, or `SERVER`.
        rederives: unconfirmed sends can be made again from the snapshot, so a snapshot may be taken
            while some are under way. Otherwise one counts only when its sends are confirmed.
        journalled: the order between senders depends on timing and must be written down.
        excluded: senders whom the role goes on without, and how many messages were applied before.
    """

    rederives: ClassVar[bool]

    def __init__(self, name: str) -> None:
        self.name = name
        self.journalled = False
        self.excluded: dict[str, int] = {}

    @abstractmethod
    def payload(self, kind: Kind) -> Payload | None:
        """The contract of a kind of message; None for a kind that this system does not use."""

    @abstractmethod
    def start(self) -> list[Effect]:
        """Called once in every process, after `restore` where there is something to restore."""

    def next(self) -> list[Effect]:
        """More work that no message asked for; empty when there is nothing to do but wait."""
        return []

    def choose(self, ready: Set[str]) -> str | None:
        """Which sender's next message is applied; None to wait for one that is not `ready`."""
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
        """Count a message in sequence as applied although it was refused."""

    def exclude(self, sender: str) -> list[Effect]:
        """Go on without a sender for ever; it is then in `excluded`, and no message of it is applied."""
        raise NotImplementedError

    def close(self) -> list[Effect]:
        """Go on with what there is, without waiting for more."""
        raise NotImplementedError

    @abstractmethod
    def snapshot(self, first_unconfirmed: int | None) -> Snapshot:
        """All state, in tensors that later work does not change.

        Args:
            first_unconfirmed: lowest seq that was sent and is not confirmed; None when all are.
                A role that rederives continues from there after a restore.
        """

    def saved(self) -> list[Effect]:
        """The last snapshot is durable; its inputs will be acknowledged after the next one."""
        return []

    @abstractmethod
    def restore(self, snapshot: Snapshot) -> None:
        """Continue from a snapshot."""
