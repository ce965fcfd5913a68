"""Durable SQLite database shared by several processes of one host.

A committed transaction survives a power cut (write-ahead log, synchronous=FULL). A writer waits
while the file is locked; SQLite does not queue waiting writers, so keep transactions short.
"""

import errno
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nightsplit.shared.errors import BrokerError
from nightsplit.shared.storage.files import keep_private, make_folder

BUSY_SECONDS = 5.0
"""Longest wait of a transaction for the transactions of others, before it fails as locked."""


def open_database(path: Path, schema: str) -> sqlite3.Connection:
    """Open `path`, creating it and its folder, and run `schema`, which must be repeatable.

    Only its owner may read it, or StateError 513; SQLite gives the files beside it the same mode.
    """
    make_folder(path.parent)
    database = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    deadline = time.monotonic() + 2 * BUSY_SECONDS
    while True:
        try:
            keep_private(path)
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=FULL")
            database.executescript(schema)
            return database
        except sqlite3.OperationalError as error:
            # SQLite fails without waiting when two processes create the file at once.
            if not is_locked(error) or time.monotonic() > deadline:
                database.close()
                raise
            time.sleep(0.01)
        except BaseException:
            database.close()
            raise


@contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[None]:
    """Run the body as one transaction, as the only writer; it is durable when the body has ended."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise


@contextmanager
def broker_errors(number: int, path: Path) -> Iterator[None]:
    """Raise an OSError or sqlite3.Error of the body as BrokerError `number`."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        remedy = "use a writable folder on a local disk with 64 MiB of free space."
        raise BrokerError(number, f"{path}: {explain(error)}.", remedy) from None


def is_locked(error: Exception) -> bool:
    """Return whether another process's transaction locks the database."""
    # Extended codes carry the primary code in their low byte.
    return isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY


def is_full(error: Exception) -> bool:
    """Return whether the disk is full."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL


def explain(error: Exception) -> str:
    """Describe a failure of the disk in one clause."""
    if is_full(error):
        return "disk is full"
    if is_locked(error):
        return "another process has been holding the database"
    return str(error)
