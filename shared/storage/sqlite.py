"""SQLite as a durable file that several processes of one host share.

What was committed survives a power cut (write-ahead log, synchronous=FULL). A writer that finds
the file locked waits; SQLite does not queue those who wait, so keep transactions short.
"""

import errno
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nightsplit.shared.errors import BrokerError
from nightsplit.shared.storage.files import keep_private

BUSY_SECONDS = 5.0
"""How long a transaction waits for the transactions of others before it fails as locked."""


def open_database(path: Path, schema: str) -> sqlite3.Connection:
    """Open `path`, creating it and its folder, and run `schema`, which must be repeatable.

    Its owner alone may read it; SQLite gives the files beside it the same mode.

    Raises:
        OSError, sqlite3.Error: see `broker_errors`.
        StateError: 513 others may read it, and it is shared with other users.
    """
    path.parent.mkdir(0o700, parents=True, exist_ok=True)
    database = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    patience = time.monotonic() + 2 * BUSY_SECONDS
    while True:
        try:
            keep_private(path)
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=FULL")
            database.executescript(schema)
            return database
        except sqlite3.OperationalError as error:
            # Two processes that create the file at once: here SQLite fails without waiting.
            if not is_locked(error) or time.monotonic() > patience:
                database.close()
                raise
            time.sleep(0.01)
        except BaseException:
            database.close()
            raise


@contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[None]:
    """All or nothing, alone among writers; durable when the block has ended."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise


@contextmanager
def broker_errors(number: int, place: Path) -> Iterator[None]:
    """Raise what goes wrong with the file, an OSError or sqlite3.Error, as BrokerError `number`."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        what = f"{place}: {explain(error)}."
        remedy = "use a folder on a local disk that may be written and has 64 MiB of room."
        raise BrokerError(number, what, remedy) from None


def is_locked(error: Exception) -> bool:
    """Whether only another process's transaction stands in the way."""
    # Extended codes carry the primary code in their low byte.
    return isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY


def is_full(error: Exception) -> bool:
    """Whether the disk has no room left."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL


def explain(error: Exception) -> str:
    """One clause on what happened, in words of the disk."""
    if is_full(error):
        return "disk is full"
    if is_locked(error):
        return "another process has been holding the database"
    return str(error)
