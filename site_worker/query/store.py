"""The durable store of a site's queries: submissions, the progress of each query, and scores.

submissions ──▶ wait ──▶ queries, with one packing for all waiting sequences ──▶ scores, by submission
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
    """Submission and row of a sequence; both count from 1."""

    submission: int
    row: int
    patient: str


@dataclass(frozen=True, eq=False)
class Query:
    """Sequences that are evaluated together.

    Attributes:
        number: 1, 2, 3... at this site.
        keys: sha256 of the public keys of its ciphertexts.
        origins: origin of each sequence.
        features: float64 (n, frames, features).
        step: present step, from 0.
        sent: whether the broker has confirmed all messages of this step.
        state: state that this step returns to the server, blinded, float64 (capacity, 2 hidden + 1); None at the
            first step.
        blinding: id of the state's blinding; empty at the first step.
        logits: float64 (n,); None until they are here.
        refusal: reason why there is no answer; None unless refused.
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
    """Progress of an open query; attributes as in `Query`."""

    number: int
    step: int
    sent: bool


class QueryStore:
    """Queries of one site and run in a SQLite file; StateError 501 if the file cannot be used."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._errors():
            self._rows = open_database(path, _SCHEMA)

    def close(self) -> None:
        """Close the file."""
        self._rows.close()

    def submit(self, patients: Sequence[str], features: FloatArray) -> None:
        """Store sequences, float64 (n, frames, features)."""
        with self._errors(), transaction(self._rows):
            self._rows.execute(
                "INSERT INTO submission (patients, shape, features) VALUES (?, ?, ?)",
                (json.dumps(list(patients)), json.dumps(features.shape), features.tobytes()),
            )

    def form(self, keys: str, packing_for: Callable[[int], tuple[str, int]]) -> None:
        """Form queries from all waiting sequences, for the public keys with the sha256 `keys`.

        `packing_for` is `QueryRole.packing_for`.
        """
        with self._errors(), transaction(self._rows):
            waiting = self._rows.execute("SELECT * FROM submission ORDER BY number").fetchall()
            if not waiting:
                return
            features = np.concatenate([_parse_array(content, shape) for _, _, shape, content in waiting])
            origins = [
                Origin(number, row, patient)
                for number, patients, _, _ in waiting
                for row, patient in enumerate(json.loads(patients), 1)
            ]
            packing, capacity = packing_for(len(origins))
            for first in range(0, len(origins), capacity):
                part, part_origins = features[first : first + capacity], json.dumps(origins[first : first + capacity])
                self._rows.execute(
                    "INSERT INTO query (keys, packing, origins, shape, features) VALUES (?, ?, ?, ?, ?)",
                    (keys, packing, part_origins, json.dumps(part.shape), part.tobytes()),
                )
            self._rows.execute("DELETE FROM submission")

    def count_waiting(self) -> int:
        """Return the number of sequences that wait for `form`."""
        with self._errors():
            rows = self._rows.execute("SELECT patients FROM submission").fetchall()
        return sum(len(json.loads(patients)) for (patients,) in rows)

    def open(self) -> list[OpenQuery]:
        """Return the queries without an answer or refusal, by number."""
        with self._errors():
            rows = self._rows.execute(
                "SELECT number, step, sent FROM query WHERE logits IS NULL AND refusal IS NULL ORDER BY number"
            ).fetchall()
        return [OpenQuery(number, step, bool(sent)) for number, step, sent in rows]

    def get(self, number: int) -> Query:
        """Return the query with this number, which must exist."""
        with self._errors():
            return _parse_query(self._rows.execute("SELECT * FROM query WHERE number = ?", (number,)).fetchone())

    def all(self) -> Iterator[Query]:
        """Yield all queries, by number."""
        with self._errors():
            numbers = self._rows.execute("SELECT number FROM query ORDER BY number").fetchall()
        return (self.get(number) for (number,) in numbers)

    def has_sent_keys(self, keys: str) -> bool:
        """Return whether the broker has confirmed these public keys."""
        with self._errors():
            return self._rows.execute("SELECT 1 FROM announced WHERE keys = ?", (keys,)).fetchone() is not None

    def mark_keys_sent(self, keys: str) -> None:
        """Record that the broker has confirmed these public keys."""
        with self._errors(), transaction(self._rows):
            self._rows.execute("INSERT OR IGNORE INTO announced VALUES (?)", (keys,))

    def mark_keys_unsent(self, keys: str) -> None:
        """Record that the server does not have these keys: they and their open queries must be sent again."""
        with self._errors(), transaction(self._rows):
            self._rows.execute("DELETE FROM announced WHERE keys = ?", (keys,))
            self._rows.execute("UPDATE query SET sent = 0 WHERE keys = ? AND logits IS NULL", (keys,))

    def mark_sent(self, number: int, step: int) -> None:
        """Record that the broker has confirmed a step; its answer may have come before, then nothing changes."""
        with self._errors(), transaction(self._rows):
            self._rows.execute("UPDATE query SET sent = 1 WHERE number = ? AND step = ?", (number, step))

    def advance(self, number: int, step: int, state: FloatArray, blinding: str) -> None:
        """Record a step's answer, so that the next step may be sent."""
        self._set(number, step=step, sent=False, state=state.tobytes(), width=state.shape[1], blinding=blinding)

    def restart(self, number: int) -> None:
        """Start again from step 0, since no server can remove the blinding of the state."""
        self._set(number, step=0, sent=False, state=None, blinding="")

    def save_logits(self, number: int, logits: FloatArray) -> None:
        """Save the scores of a query."""
        self._set(number, logits=logits.tobytes(), state=None)

    def save_refusal(self, number: int, refusal: str) -> None:
        """Save the reason why a query gets no scores."""
        self._set(number, refusal=refusal)

    def _set(self, number: int, **values: Any) -> None:
        columns = ", ".join(f"{name} = ?" for name in values)
        with self._errors(), transaction(self._rows):
            self._rows.execute(f"UPDATE query SET {columns} WHERE number = ?", (*values.values(), number))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Raise StateError 501 for an error of the file."""
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            remedy = "make room, or restore the file from a backup."
            raise StateError(501, f"{self._path}: {explain(error)}.", remedy) from None


def _parse_query(row: Sequence[Any]) -> Query:
    number, keys, packing, origins, shape, features, step, sent, state, width, blinding, logits, refusal = row
    return Query(
        number, keys, packing, tuple(Origin(*origin) for origin in json.loads(origins)), _parse_array(features, shape),
        step, bool(sent), None if state is None else np.frombuffer(state).reshape(-1, width), blinding,
        None if logits is None else np.frombuffer(logits), refusal,
    )  # fmt: skip


def _parse_array(content: bytes, shape: str) -> FloatArray:
    return np.frombuffer(content).reshape(json.loads(shape))
