"""The queries of a site: what was submitted, how far each is, and the scores. Durable before all else."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shared.errors import StateError
from shared.models.judge import Numbers
from shared.sqlite import explain, open_database, transaction

_SCHEMA = """
CREATE TABLE IF NOT EXISTS query (
    number INTEGER PRIMARY KEY AUTOINCREMENT, keys TEXT NOT NULL, packing TEXT NOT NULL, patients TEXT NOT NULL,
    shape TEXT NOT NULL, features BLOB NOT NULL, step INTEGER NOT NULL DEFAULT 0, sent INTEGER NOT NULL DEFAULT 0,
    state BLOB, width INTEGER, logits BLOB, refusal TEXT
);
CREATE TABLE IF NOT EXISTS announced (keys TEXT PRIMARY KEY);
"""


@dataclass(frozen=True, eq=False)
class Query:
    """Sequences that are judged together.

    Attributes:
        number: 1, 2, 3... at this site.
        keys: sha256 of the public keys that it was begun with.
        packing: of its ciphertexts.
        patients: whom each sequence belongs to.
        features: float64 (n, frames, features).
        step: the one that is asked for or answered next, from 0.
        sent: whether the broker holds all of this step.
        state: blinded numbers that this step gives back to the server, float64 (capacity, 2 hidden + 1); None at
            the first step.
        logits: float64 (n,), once they are there.
        refusal: why the server cannot answer it; None while it may.
    """

    number: int
    keys: str
    packing: str
    patients: tuple[str, ...]
    features: Numbers
    step: int
    sent: bool
    state: Numbers | None
    logits: Numbers | None
    refusal: str | None


class Place(NamedTuple):
    """Where an open query is; attributes as of `Query`."""

    number: int
    step: int
    sent: bool


class Queries:
    """The queries of one site and run, in a SQLite file.

    Args:
        path: the file; made where it is missing.

    Raises:
        StateError: 501 it cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._trouble():
            self._rows = open_database(path, _SCHEMA)

    def close(self) -> None:
        """Release the file."""
        self._rows.close()

    def submit(self, keys: str, packing: str, patients: Sequence[str], features: Numbers) -> int:
        """Take a query in; returns its number."""
        with self._trouble(), transaction(self._rows):
            added = self._rows.execute(
                "INSERT INTO query (keys, packing, patients, shape, features) VALUES (?, ?, ?, ?, ?)",
                (keys, packing, json.dumps(list(patients)), json.dumps(features.shape), features.tobytes()),
            )
            assert added.lastrowid is not None
            return added.lastrowid

    def open(self) -> list[Place]:
        """Queries to which an answer may come, in the order of their numbers."""
        with self._trouble():
            rows = self._rows.execute(
                "SELECT number, step, sent FROM query WHERE logits IS NULL AND refusal IS NULL ORDER BY number"
            ).fetchall()
        return [Place(number, step, bool(sent)) for number, step, sent in rows]

    def get(self, number: int) -> Query:
        """The query of that number, which there is."""
        with self._trouble():
            return _query(self._rows.execute("SELECT * FROM query WHERE number = ?", (number,)).fetchone())

    def all(self) -> Iterator[Query]:
        """All that were ever submitted, one after the other."""
        with self._trouble():
            numbers = self._rows.execute("SELECT number FROM query ORDER BY number").fetchall()
        return (self.get(number) for (number,) in numbers)

    def is_announced(self, keys: str) -> bool:
        """Whether the broker has held these public keys for the server."""
        with self._trouble():
            return self._rows.execute("SELECT 1 FROM announced WHERE keys = ?", (keys,)).fetchone() is not None

    def announced(self, keys: str) -> None:
        """The broker holds them."""
        with self._trouble(), transaction(self._rows):
            self._rows.execute("INSERT OR IGNORE INTO announced VALUES (?)", (keys,))

    def forgotten(self, keys: str) -> None:
        """The server does not know them: they and what was begun with them have to be sent again."""
        with self._trouble(), transaction(self._rows):
            self._rows.execute("DELETE FROM announced WHERE keys = ?", (keys,))
            self._rows.execute("UPDATE query SET sent = 0 WHERE keys = ? AND logits IS NULL", (keys,))

    def sent(self, number: int, step: int) -> None:
        """The broker holds all of a step. An answer may have come before it said so."""
        with self._trouble(), transaction(self._rows):
            self._rows.execute("UPDATE query SET sent = 1 WHERE number = ? AND step = ?", (number, step))

    def advance(self, number: int, step: int, state: Numbers) -> None:
        """The next step may be sent."""
        self._set(number, step=step, sent=False, state=state.tobytes(), width=state.shape[1])

    def answered(self, number: int, logits: Numbers) -> None:
        """The scores are there."""
        self._set(number, logits=logits.tobytes(), state=None)

    def refused(self, number: int, refusal: str) -> None:
        """There will be no scores."""
        self._set(number, refusal=refusal)

    def _set(self, number: int, **values: Any) -> None:
        columns = ", ".join(f"{name} = ?" for name in values)
        with self._trouble(), transaction(self._rows):
            self._rows.execute(f"UPDATE query SET {columns} WHERE number = ?", (*values.values(), number))

    @contextmanager
    def _trouble(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise StateError(
                501, f"{self._path}: {explain(error)}.", "make room, or restore the file from a backup."
            ) from None


def _query(row: Sequence[Any]) -> Query:
    number, keys, packing, patients, shape, features, step, sent, state, width, logits, refusal = row
    n, frames, length = json.loads(shape)
    return Query(
        number,
        keys,
        packing,
        tuple(json.loads(patients)),
        np.frombuffer(features).reshape(n, frames, length),
        step,
        bool(sent),
        None if state is None else np.frombuffer(state).reshape(-1, width),
        None if logits is None else np.frombuffer(logits),
        refusal,
    )
