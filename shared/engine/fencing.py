"""The right to let checkpoints count, where several workers could hold one role."""

from typing import Protocol

from nightsplit.shared.storage.checkpoint import Pointer


class CheckpointAuthority(Protocol):
    """The run store's word on who acts, as a worker needs it."""

    @property
    def fence(self) -> int:
        """Incarnation of the server; 0 at a site."""

    def pointer(self) -> Pointer | None:
        """The newest checkpoint that counts; None at a site, or when none was written."""

    def move_pointer(self, pointer: Pointer) -> bool:
        """Make a checkpoint count; False when a later incarnation took over."""

    def journal(self, position: int, sender: str) -> str:
        """Write down, durably, who is applied at `position`; returns who was written down first."""

    def journalled(self, position: int) -> str | None:
        """Who was written down at `position`."""


class SoleWriter:
    """The authority of a worker whose folder is locked, so that no other can hold its role (`lock_folder`)."""

    fence = 0

    def pointer(self) -> Pointer | None:
        """No pointer is kept: the newest checkpoint counts."""
        return None

    def move_pointer(self, pointer: Pointer) -> bool:
        """Nobody could have taken over."""
        return True

    def journal(self, position: int, sender: str) -> str:
        """A site has one sender, so there is no order to keep."""
        return sender

    def journalled(self, position: int) -> str | None:
        """As `journal`."""
        return None
