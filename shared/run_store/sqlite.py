"""Run store in a file, for the processes of one host. A returned change survives a power cut.

Leases use the monotonic clock, which the processes of a host share, so that setting the wall clock
ends no lease; one that ends later than a lease can last dates from before a reboot. Ages of
statuses use the wall clock, since they have to make sense after a reboot.
"""

import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from typing_extensions import override

from nightsplit.shared.run_store.base import RunStore, Status, age_seconds
from nightsplit.shared.run_store.status import WorkerStatus, read_status, record_bytes_max, write_status
from nightsplit.shared.storage.checkpoint import Pointer
from nightsplit.shared.storage.sqlite import broker_errors, open_database, transaction

SCHEMA = """
CREATE TABLE IF NOT EXISTS status (
    run TEXT NOT NULL, worker TEXT NOT NULL, facts TEXT NOT NULL, written REAL NOT NULL, -- wall clock
    PRIMARY KEY (run, worker)
);
CREATE TABLE IF NOT EXISTS lease (
    run TEXT PRIMARY KEY, fence INTEGER NOT NULL, owner TEXT, expires REAL NOT NULL -- monotonic seconds
);
CREATE TABLE IF NOT EXISTS pointer (
    run TEXT PRIMARY KEY, fence INTEGER NOT NULL, counter INTEGER NOT NULL, sha256 TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS journal (
    run TEXT NOT NULL, position INTEGER NOT NULL, sender TEXT NOT NULL, PRIMARY KEY (run, position)
);
"""


class SqliteStore(RunStore):
    """State of `run` in a file on a local disk, perhaps beside other runs; BrokerError 207 if it cannot be used."""

    def __init__(self, path: Path, run: str) -> None:
        self._path = path
        self._run = run
        self._lock = threading.Lock()
        with broker_errors(207, path):
            self._rows = open_database(path, SCHEMA)

    @override
    def put_status(self, worker: str, status: WorkerStatus) -> None:
        with self._writing() as rows:
            row = (self._run, worker, write_status(status), time.time())
            rows.execute("REPLACE INTO status VALUES (?, ?, ?, ?)", row)

    @override
    def statuses(self, workers: Iterable[str]) -> dict[str, Status]:
        found: dict[str, Status] = {}
        with self._reading() as rows:
            for worker in workers:
                # As bytes, since SQLite raises an error on text that is not UTF-8.
                row = rows.execute(
                    "SELECT ifnull(substr(CAST(facts AS BLOB), 1, ?), ''), CAST(written AS REAL) FROM status"
                    " WHERE run = ? AND worker = ?",
                    (record_bytes_max(worker) + 1, self._run, worker),
                ).fetchone()
                if row is not None:
                    found[worker] = Status(worker, read_status(row[0], worker), age_seconds(time.time(), row[1]))
        return found

    @override
    def now(self) -> float:
        return time.time()

    @override
    def acquire_lease(self, owner: str, ttl_seconds: float) -> int | None:
        with self._writing() as rows:
            now = time.monotonic()
            fence, holder, expires = rows.execute(
                "SELECT fence, owner, expires FROM lease WHERE run = ?", (self._run,)
            ).fetchone() or (0, None, 0.0)
            if holder not in (None, owner) and now < expires <= now + ttl_seconds:
                return None
            rows.execute("REPLACE INTO lease VALUES (?, ?, ?, ?)", (self._run, fence + 1, owner, now + ttl_seconds))
            return int(fence) + 1

    @override
    def renew_lease(self, owner: str, fence: int, ttl_seconds: float) -> bool:
        with self._writing() as rows:
            renewed = rows.execute(
                "UPDATE lease SET expires = ? WHERE run = ? AND owner = ? AND fence = ?",
                (time.monotonic() + ttl_seconds, self._run, owner, fence),
            )
            return renewed.rowcount == 1

    @override
    def release_lease(self, owner: str, fence: int) -> None:
        with self._writing() as rows:
            command = "UPDATE lease SET owner = NULL WHERE run = ? AND owner = ? AND fence = ?"
            rows.execute(command, (self._run, owner, fence))

    @override
    def pointer(self) -> Pointer | None:
        with self._reading() as rows:
            found = rows.execute("SELECT fence, counter, sha256 FROM pointer WHERE run = ?", (self._run,)).fetchone()
        return None if found is None else Pointer(*found)

    @override
    def move_pointer(self, pointer: Pointer) -> bool:
        with self._writing() as rows:
            moved = rows.execute(
                "REPLACE INTO pointer SELECT :run, :fence, :counter, :sha256"
                " WHERE NOT EXISTS (SELECT 1 FROM lease WHERE run = :run AND fence > :fence)",
                {"run": self._run, "fence": pointer.fence, "counter": pointer.counter, "sha256": pointer.sha256},
            )
            return moved.rowcount == 1

    @override
    def claim_position(self, position: int, entry: str) -> str:
        with self._writing() as rows:
            rows.execute("INSERT OR IGNORE INTO journal VALUES (?, ?, ?)", (self._run, position, entry))
            filled = self._entry(rows, position)
            assert filled is not None
            return filled

    @override
    def journal_entry(self, position: int) -> str | None:
        with self._reading() as rows:
            return self._entry(rows, position)

    @override
    def close(self) -> None:
        self._rows.close()

    def _entry(self, rows: sqlite3.Connection, position: int) -> str | None:
        query = "SELECT sender FROM journal WHERE run = ? AND position = ?"
        found = rows.execute(query, (self._run, position)).fetchone()
        return None if found is None else str(found[0])

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock, broker_errors(207, self._path):
            yield self._rows

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._reading(), transaction(self._rows):
            yield self._rows
