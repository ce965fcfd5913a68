"""Messages that a worker has sent and cannot make again, kept until their receiver has saved what they do.

    keep ──▶ memory ──sync──▶ disk, before the checkpoint that counts them ──release──▶ removed

A broker may lose a message (a policy with a time to live, a purged queue, a damaged body); its receiver then asks for
it by number. After a crash the worker makes all messages since its checkpoint again, so those in memory are no loss.
"""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nightsplit.shared.errors import StateError
from nightsplit.shared.storage.sqlite import explain, open_database, transaction

FILE = "sent.sqlite"
"""Name of the file in a worker's state folder."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS sent (
    receiver TEXT NOT NULL, seq INTEGER NOT NULL, message_id TEXT NOT NULL, body BLOB NOT NULL,
    PRIMARY KEY (receiver, seq)
);
"""


class SentMessages:
    """Kept messages of one worker, over the rows of a database with `SCHEMA`; errors are StateError 501."""

    def __init__(self, rows: sqlite3.Connection, path: Path = Path(FILE)) -> None:
        self._rows, self._path = rows, path
        self._unsynced: dict[tuple[str, int], tuple[str, bytes]] = {}

    def keep(self, receiver: str, seq: int, message_id: str, body: Sequence[bytes | memoryview]) -> None:
        """Keep a copy of message `seq` to a receiver, in place of an earlier one."""
        self._unsynced[receiver, seq] = message_id, b"".join(body)

    def find(self, receiver: str, seq: int) -> tuple[str, bytes] | None:
        """Return id and body of message `seq` to a receiver; None if it was not sent yet, or is released."""
        if (receiver, seq) in self._unsynced:
            return self._unsynced[receiver, seq]
        with _state_errors(self._path):
            query = "SELECT message_id, body FROM sent WHERE receiver = ? AND seq = ?"
            found: tuple[str, bytes] | None = self._rows.execute(query, (receiver, seq)).fetchone()
        return found

    def release(self, receiver: str, last: int) -> None:
        """Remove the messages up to `last` to a receiver."""
        for key in [key for key in self._unsynced if key[0] == receiver and key[1] <= last]:
            del self._unsynced[key]
        with _state_errors(self._path):
            self._rows.execute("DELETE FROM sent WHERE receiver = ? AND seq <= ?", (receiver, last))

    def sync(self) -> None:
        """Force all messages to disk."""
        if self._unsynced:
            with _state_errors(self._path), transaction(self._rows):
                kept = ((*key, *message) for key, message in self._unsynced.items())
                self._rows.executemany("INSERT OR REPLACE INTO sent VALUES (?, ?, ?, ?)", kept)
            self._unsynced.clear()


@contextmanager
def open_sent(folder: Path) -> Iterator[SentMessages]:
    """Open the messages kept in a state folder, which are closed with the context."""
    path = folder / FILE
    with _state_errors(path):
        rows = open_database(path, SCHEMA)
    try:
        yield SentMessages(rows, path)
    finally:
        rows.close()


@contextmanager
def _state_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        remedy = (
            "make room on that disk, then start the worker again: it continues where it was. If the file is damaged, "
            "remove it: it holds copies of messages in case that the broker loses one."
        )
        raise StateError(501, f"{path}: {explain(error)}.", remedy) from None
