"""The queries of a site: what was submitted, how far each is, and the scores. Durable before all else.

submissions ──▶ wait ──▶ queries of the packing that suits all that wait ──▶ scores, by submission
"""

import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nightsplit.shared.errors import StateError
from nightsplit.shared.he.weights import FloatArray
from nightsplit.shared.storage.sqlite import explain, open_database, transaction

_SCHEMA = """
CREATE TABLE IF NOT EXISTS submission (
    number INTEGER PRIMARY KEY AUTOINCREMENT, patients TEXT NOT NULL, shape TEXT NOT NULL, features BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS query (
    number INTEGER PRIMARY KEY AUTOINCREMENT, keys TEXT NOT NULL, packing TEXT NOT NULL, origins TEXT NOT NULL,
    shape TEXT NOT NULL, features BLOB NOT NULL, step INTEGER NOT NULL DEFAULT 0, sent INTEGER NOT NULL DEFAULT 0,
    state BLOB, width INTEGER, blinding TEXT NOT NULL DEFAULT '', logits BLOB, refusal TEXT
);
CREATE TABLE IF NOT EXISTS announced (keys TEXT PRIMARY KEY);
"""


class Origin(NamedTuple):
    """Where a sequence comes from; submissions of a site, and rows of a submission, count from 1."""

    submission: int
    row: int
    patient: str


@dataclass(frozen=True, eq=False)
class Query:
    """Sequences that are judged together.

    Attributes:
        number: 1, 2, 3... at this site.
        keys: sha256 of the public keys that it was begun with.
        origins: of its sequences.
        features: float64 (n, frames, features).
        step: the one that is asked for or answered next, from 0.
        sent: whether the broker holds all of this step.
        state: blinded numbers that this step gives back to the server, float64 (capacity, 2 hidden + 1); None at
            the first step.
        blinding: names what they are blinded with; empty at the first step.
        logits: float64 (n,), once they are there.
        refusal: why the server cannot answer it; None while it may.
    """

    number: int
    keys: str
    packing: str
    origins: tuple[Origin, ...]
    features: FloatArray
    step: int
    sent: bool
    state: FloatArray | None
    blinding: str
    logits: FloatArray | None
    refusal: str | None


class OpenQuery(NamedTuple):
    """Where an open query is; attributes as of `Query`."""

    number: int
    step: int
    sent: bool


class QueryStore:
    """The queries of one site and run, in a SQLite file; StateError 501 where that cannot be used."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._trouble():
            self._rows = open_database(path, _SCHEMA)

    def close(self) -> None:
        """Release the file."""
        self._rows.close()

    def submit(self, patients: Sequence[str], features: FloatArray) -> None:
        """Take sequences in, float64 (n, frames, features)."""
        with self._trouble(), transaction(self._rows):
            self._rows.execute(
                "INSERT INTO submission (patients, shape, features) VALUES (?, ?, ?)",
                (json.dumps(list(patients)), json.dumps(features.shape), features.tobytes()),
            )

    def form(self, keys: str, packing_for: Callable[[int], tuple[str, int]]) -> None:
        """Make queries of all sequences that wait, to be encrypted for the public keys with the sha256 `keys`.

        `packing_for` names the packing that suits so many sequences, and how many of them it takes at once.
        """
        with self._trouble(), transaction(self._rows):
            waiting = self._rows.execute("SELECT * FROM submission ORDER BY number").fetchall()
            if not waiting:
                return
            features = np.concatenate([_array(content, shape) for _, _, shape, content in waiting])
            origins = [
                Origin(number, row, patient)
                for number, patients, _, _ in waiting
                for row, patient in enumerate(json.loads(patients), 1)
            ]
            packing, capacity = packing_for(len(origins))
            for first in range(0, len(origins), capacity):
                part, whose = features[first : first + capacity], json.dumps(origins[first : first + capacity])
                self._rows.execute(
                    "INSERT INTO query (keys, packing, origins, shape, features) VALUES (?, ?, ?, ?, ?)",
                    (keys, packing, whose, json.dumps(part.shape), part.tobytes()),
                )
            self._rows.execute("DELETE FROM submission")

    def unformed(self) -> int:
        """Sequences that wait for `form`."""
        with self._trouble():
            rows = self._rows.execute("SELECT patients FROM submission").fetchall()
        return sum(len(json.loads(patients)) for (patients,) in rows)

    def open(self) -> list[OpenQuery]:
        """QueryStore to which an answer may come, in the order of their numbers."""
        with self._trouble():
            rows = self._rows.execute(
                "SELECT number, step, sent FROM query WHERE logits IS NULL AND refusal IS NULL ORDER BY number"
            ).fetchall()
        return [OpenQuery(number, step, bool(sent)) for number, step, sent in rows]

    def get(self, number: int) -> Query:
        """The query of that number, which there is."""
        with self._trouble():
            return _query(self._rows.execute("SELECT * FROM query WHERE number = ?", (number,)).fetchone())

    def all(self) -> Iterator[Query]:
        """All that were ever formed, one after the other."""
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

    def advance(self, number: int, step: int, state: FloatArray, blinding: str) -> None:
        """The next step may be sent."""
        self._set(number, step=step, sent=False, state=state.tobytes(), width=state.shape[1], blinding=blinding)

    def begin_again(self, number: int) -> None:
        """No server can go on with it."""
        self._set(number, step=0, sent=False, state=None, blinding="")

    def answered(self, number: int, logits: FloatArray) -> None:
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
            remedy = "make room, or restore the file from a backup."
            raise StateError(501, f"{self._path}: {explain(error)}.", remedy) from None


def _query(row: Sequence[Any]) -> Query:
    number, keys, packing, origins, shape, features, step, sent, state, width, blinding, logits, refusal = row
    whose = tuple(Origin(*origin) for origin in json.loads(origins))
    blinded = None if state is None else np.frombuffer(state).reshape(-1, width)
    scores = None if logits is None else np.frombuffer(logits)
    asked = _array(features, shape)
    return Query(number, keys, packing, whose, asked, step, bool(sent), blinded, blinding, scores, refusal)


def _array(content: bytes, shape: str) -> FloatArray:
    return np.frombuffer(content).reshape(json.loads(shape))
