"""Messages that a worker has sent and cannot make again, kept until their receiver has saved what they do.

    keep ──▶ memory ──sync──▶ a file, before the checkpoint that counts them ──release──▶ removed

    <state>/sent/<receiver>/<first>-<last>   messages between two checkpoints: a line of JSON with the id and size of
                                             each, and their bodies, both in the order of their numbers

A broker may lose a message (a policy with a time to live, a purged queue, a damaged body); its receiver then asks for
it by number. After a crash the worker makes all messages since its checkpoint again, so those in memory are no loss.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from nightsplit.shared.errors import StateError
from nightsplit.shared.storage.files import make_private_folder, write_atomic

FOLDER = "sent"
"""Name of the folder in a worker's state folder."""


class SentMessages:
    """Kept messages of one worker, in a folder; errors are StateError 501."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.unsynced: dict[tuple[str, int], tuple[str, bytes]] = {}
        """Id and body of the messages in memory, by receiver and seq."""

    def keep(self, receiver: str, seq: int, message_id: str, body: Sequence[bytes | memoryview]) -> None:
        """Keep a copy of message `seq` to a receiver, in place of an earlier one."""
        self.unsynced[receiver, seq] = message_id, b"".join(body)

    def find(self, receiver: str, seq: int) -> tuple[str, bytes] | None:
        """Return id and body of message `seq` to a receiver; None if it was not sent yet, or is released."""
        if (receiver, seq) in self.unsynced:
            return self.unsynced[receiver, seq]
        for path, seqs in self._files(receiver):
            if seq in seqs:
                with _errors(path), path.open("rb") as file:
                    listed, place = json.loads(file.readline()), seqs.index(seq)
                    file.seek(sum(size for _, size in listed[:place]), os.SEEK_CUR)
                    message_id, size = listed[place]
                    return message_id, file.read(size)
        return None

    def release(self, receiver: str, last: int) -> None:
        """Remove messages up to `last` to a receiver, but those of a file with later ones."""
        for path, seqs in self._files(receiver):
            if seqs[-1] <= last:
                with _errors(path):
                    path.unlink(missing_ok=True)

    def sync(self) -> None:
        """Force all messages to disk."""
        for receiver in {receiver for receiver, _ in self.unsynced}:
            seqs = sorted(seq for to, seq in self.unsynced if to == receiver)
            messages = [self.unsynced[receiver, seq] for seq in seqs]
            path = self._folder / receiver / f"{seqs[0]:09d}-{seqs[-1]:09d}"
            with _errors(path):
                make_private_folder(path.parent)
                write_atomic(path, partial(_write, messages))
        self.unsynced.clear()

    def _files(self, receiver: str) -> Iterator[tuple[Path, range]]:
        """Yield each file with messages to a receiver, and their numbers, which have no gaps."""
        for path in (self._folder / receiver).glob("[0-9]*"):
            first, _, last = path.name.partition("-")
            yield path, range(int(first), int(last) + 1)


def _write(messages: Sequence[tuple[str, bytes]], path: Path) -> None:
    with path.open("wb") as file:
        file.write(json.dumps([(message_id, len(body)) for message_id, body in messages]).encode() + b"\n")
        file.writelines(body for _, body in messages)


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, IndexError) as error:
        reason = error.strerror if isinstance(error, OSError) else "damaged"
        remedy = (
            "make room on that disk, then start the worker again: it continues where it was. Remove a damaged file: "
            "it holds copies of messages in case that the broker loses one."
        )
        raise StateError(501, f"{path}: {reason}.", remedy) from None
