"""Storage of the embedded broker: rows in SQLite, large bodies in files.

    folder/broker.sqlite   queues with the lease of their consumer, and one row per message
    folder/bodies/         one file per large body, synced before its row is written
    folder/lock            shared by links while one of their bodies has no row yet

A message exists when its row does. A crash therefore leaves no partial message, at most files
without a row; they are removed when no link holds the lock.
"""

import errno
import fcntl
import os
import shutil
import sqlite3
import time
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path

from nightsplit.shared.errors import BrokerError
from nightsplit.shared.storage.files import force_to_disk, make_private_folder, write_new
from nightsplit.shared.storage.sqlite import explain, is_full, open_database
from nightsplit.shared.transport import Queue

RESERVE_BYTES = 64 * 2**20
"""Disk space that messages may not use, since acknowledging, which frees space, takes some itself."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS queue (
    name TEXT PRIMARY KEY, exchange TEXT NOT NULL, key TEXT NOT NULL, limit_bytes INTEGER, dead_key TEXT,
    owner TEXT, link TEXT, expires REAL NOT NULL DEFAULT 0, -- the lease: worker, its link, monotonic seconds
    taken INTEGER NOT NULL DEFAULT 0,                       -- newest message handed to that link
    seen INTEGER NOT NULL DEFAULT 0                         -- newest message ever handed to a link
);
CREATE TABLE IF NOT EXISTS message (
    id INTEGER PRIMARY KEY AUTOINCREMENT, queue TEXT NOT NULL, message_id TEXT NOT NULL,
    headers TEXT NOT NULL, size INTEGER NOT NULL, body BLOB, file TEXT
);
CREATE INDEX IF NOT EXISTS message_of_queue ON message (queue, id, size);
"""

# Unacknowledged deliveries do not count as waiting, as in RabbitMQ: otherwise a small limit could
# be used up by messages that a server may only acknowledge after the next checkpoint, for which it
# needs further messages. A dead consumer's messages wait again.
WAITING = """
SELECT count(message.id), coalesce(sum(size), 0) FROM queue LEFT JOIN message ON message.queue = name
AND id > CASE WHEN link IS NOT NULL AND expires BETWEEN :now AND :now + :ttl THEN taken ELSE 0 END
WHERE name = :name GROUP BY name
"""

# A lease that expires later than its duration allows is from before a reboot, which reset the clock.
LEASE = """
UPDATE queue SET owner = :owner, link = :link, expires = :now + :ttl, taken = :taken, seen = max(seen, :taken)
WHERE name = :name AND (link = :link OR NOT :held AND (
    link IS NULL OR owner = :owner OR expires NOT BETWEEN :now AND :now + :ttl))
"""

LEASED = "SELECT 1 FROM queue WHERE name = :name AND link IS NOT NULL AND expires BETWEEN :now AND :now + :ttl"

NEXT = """
SELECT id, message_id, headers, body, file, id <= seen FROM queue JOIN message ON message.queue = name
WHERE name = :name AND link = :link AND id > :taken ORDER BY id LIMIT 1
"""

NewRow = tuple[str, str, str, int, bytes | None, str | None]
"""Queue, message id, headers, size in bytes, and the body or the name of its file."""

Row = tuple[int, str, str, bytes, str | None, int]
"""Id, message id, headers, body, file, and whether it was delivered before."""


class Folder:
    """Rows, within the caller's transaction, and body files of a broker. Methods raise sqlite3.Error or OSError."""

    def __init__(self, path: Path, lease_seconds: float) -> None:
        self.path = path
        self.lease_seconds = lease_seconds
        self._bodies = path / "bodies"

    def open(self) -> sqlite3.Connection:
        """Connect to the rows."""
        make_private_folder(self.path)
        make_private_folder(self._bodies)
        return open_database(self.path / "broker.sqlite", SCHEMA)

    def open_lock(self) -> int:
        """Return a file descriptor of the lock."""
        return os.open(self.path / "lock", os.O_CREAT | os.O_RDWR, 0o600)

    def declare(self, rows: sqlite3.Connection, queue: Queue) -> None:
        """Create `queue`; raises BrokerError 204 when it exists with other settings."""
        names = (queue.exchange, queue.key, queue.dead.key if queue.dead is not None else None)
        rows.execute(
            "INSERT OR IGNORE INTO queue (name, limit_bytes, exchange, key, dead_key) VALUES (?, ?, ?, ?, ?)",
            (queue.name, queue.limit_bytes, *names),
        )
        (limit,) = rows.execute("SELECT limit_bytes FROM queue WHERE name = ?", (queue.name,)).fetchone()
        if limit != queue.limit_bytes:
            sentence = f"queue {queue.name} exists with the limit {limit}, and this run needs {queue.limit_bytes}."
            raise BrokerError(204, sentence, "use the run's original limits, or another run id.")

    def require(self, rows: sqlite3.Connection, queue: str) -> None:
        """Raise BrokerError 205 when `queue` does not exist."""
        if rows.execute("SELECT 1 FROM queue WHERE name = ?", (queue,)).fetchone() is None:
            raise BrokerError(205, f"queue {queue} does not exist.", "open the run first: nightsplit open server.toml.")

    def delete(self, rows: sqlite3.Connection, queue: str) -> list[str]:
        """Remove `queue` and its messages; return the body files to remove after the commit."""
        files = rows.execute("SELECT file FROM message WHERE queue = ? AND file IS NOT NULL", (queue,)).fetchall()
        rows.execute("DELETE FROM message WHERE queue = ?", (queue,))
        rows.execute("DELETE FROM queue WHERE name = ?", (queue,))
        return [file for (file,) in files]

    def waiting(self, rows: sqlite3.Connection, queue: str) -> tuple[int, int] | None:
        """Return the messages and bytes in `queue` that no live consumer has received; None when it does not exist."""
        waiting: tuple[int, int] | None = rows.execute(WAITING, {"name": queue} | self._now()).fetchone()
        return waiting

    def lease(self, rows: sqlite3.Connection, queue: str, owner: str, link: str, taken: int, held: bool) -> bool:
        """Renew the lease of `link`, or gain it unless it was `held` and lost; return whether it has it."""
        lease = {"name": queue, "owner": owner, "link": link, "taken": taken, "held": held}
        return rows.execute(LEASE, lease | self._now()).rowcount == 1

    def is_leased(self, rows: sqlite3.Connection, queue: str) -> bool:
        """Return whether a live link has the lease of `queue`."""
        return rows.execute(LEASED, {"name": queue} | self._now()).fetchone() is not None

    def release(self, rows: sqlite3.Connection, link: str) -> None:
        """Give up all leases of `link`; its unacknowledged messages wait again."""
        rows.execute("UPDATE queue SET link = NULL, taken = 0 WHERE link = ?", (link,))

    def insert(self, rows: sqlite3.Connection, messages: Iterable[NewRow]) -> None:
        """Append messages with synced body files."""
        rows.executemany(
            "INSERT INTO message (queue, message_id, headers, size, body, file) VALUES (?, ?, ?, ?, ?, ?)", messages
        )

    def next_row(self, rows: sqlite3.Connection, queue: str, link: str, taken: int) -> Row | None:
        """Return the message after `taken` with its body; None when there is none or `link` has no lease."""
        missing = None
        while True:
            row: Row | None = rows.execute(NEXT, {"name": queue, "link": link, "taken": taken}).fetchone()
            if row is None or row[4] is None:
                return row
            try:
                return (*row[:3], (self._bodies / row[4]).read_bytes(), *row[4:])
            except FileNotFoundError:
                # Another consumer took over the queue and acknowledged it: then the row is gone as well.
                if missing == row[4]:
                    raise
                missing = row[4]

    def remove_rows(self, rows: sqlite3.Connection, ids: Iterable[int]) -> None:
        """Remove acknowledged messages; their files are to be removed after the commit."""
        rows.executemany("DELETE FROM message WHERE id = ?", [(row,) for row in ids])

    def require_room(self) -> None:
        """Raise OSError (no space left) when messages would use up the reserve."""
        if shutil.disk_usage(self.path).free < RESERVE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def describe(self, error: Exception) -> str:
        """Return the reason that blocks a writer, with the free space it needs when the disk is full."""
        room = f", {RESERVE_BYTES / 2**20:.0f} MiB have to be free" if is_full(error) else ""
        return f"{explain(error)} ({self.path}{room})"

    def write_body(self, body: Sequence[bytes | memoryview]) -> str:
        """Write and sync a body file; return its name. It counts only with its row, so it needs no rename."""

        def write(path: Path) -> None:
            with path.open("wb") as file:
                file.writelines(body)

        name = uuid.uuid4().hex
        write_new(self._bodies / name, write)
        return name

    def sync_bodies(self) -> None:
        """Make the names of new body files durable."""
        force_to_disk(self._bodies)

    def remove_bodies(self, files: Iterable[str]) -> None:
        """Delete body files that no row refers to."""
        for file in files:
            (self._bodies / file).unlink(missing_ok=True)

    def remove_orphans(self, rows: sqlite3.Connection) -> None:
        """Delete files without a row, unless a link is between file and row at this moment."""
        lock = self.open_lock()
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            files = {path.name for path in self._bodies.iterdir()}
            kept = rows.execute("SELECT file FROM message WHERE file IS NOT NULL").fetchall()
            self.remove_bodies(files.difference(file for (file,) in kept))
        except BlockingIOError:
            pass
        finally:
            os.close(lock)

    def _now(self) -> dict[str, float]:
        return {"now": time.monotonic(), "ttl": self.lease_seconds}
