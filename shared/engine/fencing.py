"""Authority over checkpoints, where several workers could hold one role."""

from typing import Protocol

from typing_extensions import override

from nightsplit.shared.errors import StateError
from nightsplit.shared.storage.checkpoint import Checkpoints, Pointer, Snapshot


class CheckpointAuthority(Protocol):
    """Right of a worker to make its checkpoints valid, and to write the journal."""

    @property
    def fence(self) -> int:
        """Incarnation of the server; 0 at a site."""

    def pointer(self) -> Pointer | None:
        """Return the pointer to the newest valid checkpoint; None at a site, or if none was written."""

    def move_pointer(self, pointer: Pointer) -> bool:
        """Make a checkpoint the newest valid one; return False if a later incarnation took over."""

    def claim_position(self, position: int, entry: str) -> str:
        """Fill `position` of the journal durably unless it is filled; return its content."""

    def journal_entry(self, position: int) -> str | None:
        """Return the entry of the journal at `position`."""


class SoleWriter(CheckpointAuthority):
    """Authority of a worker that holds its role alone, since it has locked its folder (`lock_folder`)."""

    @property
    @override
    def fence(self) -> int:
        return 0

    @override
    def pointer(self) -> Pointer | None:
        return None  # the newest checkpoint is valid

    @override
    def move_pointer(self, pointer: Pointer) -> bool:
        return True

    @override
    def claim_position(self, position: int, entry: str) -> str:
        return entry  # a site has one sender, hence no order to write down

    @override
    def journal_entry(self, position: int) -> str | None:
        return None


def write_valid(checkpoints: Checkpoints, authority: CheckpointAuthority, number: int, snapshot: Snapshot) -> None:
    """Write a checkpoint, make it the newest valid one, and remove old ones; StateError 501 or 505, nothing removed."""
    if not authority.move_pointer(checkpoints.write(authority.fence, number, snapshot)):
        sentence = f"another server with a higher fence than {authority.fence} is active."
        raise StateError(505, sentence, "nothing is lost; stop this server, or the other one.")
    checkpoints.prune()
