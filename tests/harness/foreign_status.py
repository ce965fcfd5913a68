"""Records of a worker's status as somebody may write them who is not our code, or wants to do harm."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path

FOREIGN: dict[str, bytes] = {
    "no JSON": b"hello",
    "no text": b'{"phase":"working","detail":"\xff\xfe"}',
    "another type": b'{"phase":"working","confirmed":"abc"}',
    "no phase": b'{"state":"working","confirmed":3}',
    "unknown phase": b'{"phase":"dancing"}',
    "below the range": b'{"phase":"working","sent":-1}',
    "above the range": b'{"phase":"working","sent":99999999999999999999}',
    "not finite": b'{"phase":"working","sites":{"north":{"loss":1e999}}}',
    "long words": b'{"phase":"working","detail":"' + b"x" * 5000 + b'"}',
    # Deeper than a decoder follows, however deep that is in a version of Python; to its end it would be no JSON.
    "deeply nested": b'{"phase":"working","more":' + b"[" * 16_000,
    "megabytes": b'{"phase":"working","beat":"a"' + b" " * 2**23 + b"}",
    "nothing": b"",
}


def write_row(path: Path, run: str, worker: str, record: bytes, written: object = None) -> None:
    """Put `record` into a store of SQLite in the name of `worker`; `written`: when, the present moment if None."""
    row = (run, worker, record, time.time() if written is None else written)
    with closing(sqlite3.connect(path, timeout=30)) as rows, rows:
        rows.execute("REPLACE INTO status VALUES (?, ?, CAST(? AS TEXT), ?)", row)
