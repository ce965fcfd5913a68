"""What all runs have spent on a site's data: written durably before what it pays for leaves the site.

One row per run, whatever became of it: runs that only tried out a setting have seen the data, too. A row says
how many steps are paid for; a replay after a crash pays for the same steps, which costs nothing. Beside it,
the records of each patient in the run, under a name that only the site's secret can make.

Each row is sealed with the secret. So a bit that flipped is found, and a row that somebody wrote by hand.
"""

import operator
import sqlite3
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nightsplit.shared.errors import RunError
from nightsplit.shared.storage.sqlite import explain, open_database, transaction
from nightsplit.site_worker.privacy.accounting import Spent, Use, epsilon_of, patient_epsilon
from nightsplit.site_worker.privacy.secret import Secret, make_secret, read_secret

_SCHEMA = """
CREATE TABLE IF NOT EXISTS owner (proof BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS run (
    run TEXT PRIMARY KEY, identity BLOB NOT NULL, records INTEGER NOT NULL, rate REAL NOT NULL, sigma REAL NOT NULL,
    delta REAL NOT NULL, steps INTEGER NOT NULL, patients BLOB NOT NULL, seal BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS patient (
    run TEXT NOT NULL, patient BLOB NOT NULL, records INTEGER NOT NULL, PRIMARY KEY (run, patient)
);
"""
_RESTORE = "restore ledger and key from a backup; the privacy spent is not known without them."


@dataclass(frozen=True)
class Entry:
    """A run in the ledger.

    Attributes:
        identity: keyed hash of its contract and training data: of all that its noise depends on.
        records: the site's training records in it.
        use: rate, noise, and the steps that are paid for.
        patients: keyed hash of who took part with how many records.
    """

    run: str
    identity: bytes
    records: int
    use: Use
    delta: float
    patients: bytes


@dataclass(frozen=True)
class Total:
    """What runs together have spent, at the smallest delta of any.

    Attributes:
        delta: that one; None when there is no run.
        record: of a record that took part in all of them.
        patient: of the patient who lost most, all records together.
        patient_records: the most records that this patient had in a run.
    """

    delta: float | None
    record: Spent
    patient: float
    patient_records: int


class Ledger:
    """The ledger of a site, made with its secret where both are missing; RunError 612 where it cannot be used.

    It is a SQLite file, the secret is beside it, with the suffix .key. Processes of one host may share it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        key = path.with_suffix(".key")
        with self._trouble():
            self._rows = open_database(path, _SCHEMA)
            if self._rows.execute("PRAGMA quick_check").fetchone() != ("ok",):
                raise self._unusable("the file is damaged")
            self.secret = self._own(key)

    def close(self) -> None:
        """Release the file."""
        self._rows.close()

    def begin(
        self, run: str, identity: str, use: Use, delta: float, patients: Sequence[str], most: float | None
    ) -> Entry:
        """Enter a run, or find it entered. Nothing is spent yet.

        Args:
            identity: what must not change under the run's id: its contract, and the training data's fingerprint.
            use: rate, noise, and all the steps that it plans. A run that is entered keeps its first noise.
            patients: of each training record, whose it is.
            most: epsilon that all runs together may spend on a record; None without limit.

        Raises:
            RunError: 611 the planned steps would exceed `most`; 612; 613 the id was used with another identity.
        """
        counts = sorted((self.secret.derive("patient", name).key, n) for name, n in Counter(patients).items())
        keyed = self.secret.derive("identity", identity).key
        entry = Entry(run, keyed, len(patients), replace(use, steps=0), delta, self._digest(counts))
        with self._trouble():
            known = {other.run: other for other in self.entries()}
            found = known.get(run, entry)
            if (found.identity, found.patients) != (entry.identity, entry.patients):
                remedy = "give the new run another run.id; what the old one spent stays counted."
                raise RunError(613, f"run {run!r} is in {self._path} with other data, patients or settings.", remedy)
            self._refuse_above(most, {**known, run: replace(found, use=replace(found.use, steps=use.steps))}, run)
            if run not in known:
                with transaction(self._rows):
                    row = (run, keyed, entry.records, use.rate, use.sigma, delta, 0, entry.patients, self._seal(entry))
                    self._rows.execute("INSERT INTO run VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
                    self._rows.executemany("INSERT INTO patient VALUES (?, ?, ?)", [(run, *c) for c in counts])
        return found

    def spend(self, run: str, steps: int, most: float | None) -> None:
        """Pay for the steps 1 to `steps` of a run that has begun; those paid before cost nothing more.

        Raises:
            RunError: 611 all runs together would exceed `most`: nothing is written; 612.
        """
        with self._trouble():
            while True:
                before = self.entries()
                known = {entry.run: entry for entry in before}
                if run not in known:
                    raise self._unusable(f"run {run!r} is gone from it")
                if steps <= known[run].use.steps:
                    return
                paid = replace(known[run], use=replace(known[run].use, steps=steps))
                self._refuse_above(most, {**known, run: paid}, run)
                # The arithmetic takes long, so the file is not held meanwhile: look again.
                with transaction(self._rows):
                    if self.entries() == before:
                        row = (steps, self._seal(paid), run)
                        self._rows.execute("UPDATE run SET steps = ?, seal = ? WHERE run = ?", row)
                        return

    def entries(self) -> list[Entry]:
        """Every run, in the order of entering; RunError 612 where they cannot be read."""
        with self._trouble():
            return [self._entry(row) for row in self._rows.execute("SELECT * FROM run ORDER BY rowid").fetchall()]

    def total(self, run: str | None = None) -> Total:
        """What all runs together have spent, or one run alone; RunError 612 where that cannot be read."""
        entries = [entry for entry in self.entries() if entry.use.steps and run in (None, entry.run)]
        if not entries:
            return Total(None, Spent(0.0, 0.0), 0.0, 0)
        delta = min(entry.delta for entry in entries)
        uses = [entry.use for entry in entries]
        with self._trouble():
            shares = [dict(self._patients(entry.run)) for entry in entries]
        # Who has no more records than another patient, in no run, has lost no more.
        profiles = {tuple(share.get(patient, 0) for share in shares) for patient in set().union(*shares)}
        largest = [one for one in profiles if not any(_covers(other, one) for other in profiles)]
        worst = max((patient_epsilon(list(zip(uses, one, strict=True)), delta), max(one)) for one in largest)
        return Total(delta, epsilon_of(uses, delta), *worst)

    def _refuse_above(self, most: float | None, runs: dict[str, Entry], run: str) -> None:
        if most is None:
            return
        delta = min(entry.delta for entry in runs.values())
        spent = epsilon_of([entry.use for entry in runs.values()], delta).pld
        if spent > most:
            all_runs = f"over all {len(runs)} runs (delta {delta:g}); policy.toml allows {most:g}."
            what = f"run {run!r} would bring the epsilon of a record to {spent:.3g} {all_runs}"
            planned = "plan it with a smaller privacy.epsilon; only the hospital may raise max_epsilon."
            raise RunError(611, what, f"let the run end here, or {planned}")

    def _own(self, key: Path) -> Secret:
        """The secret that this ledger was made with."""
        with transaction(self._rows):
            found = self._rows.execute("SELECT proof FROM owner").fetchall()
            if key.exists():
                secret = read_secret(key)
                if found != [(secret.derive("ledger").key,)]:
                    raise self._unusable(f"it is empty, or was not made with {key}")
            elif found:
                raise self._unusable(f"its secret {key} is missing")
            else:
                secret = make_secret(key)
                self._rows.execute("INSERT INTO owner VALUES (?)", (secret.derive("ledger").key,))
        return secret

    def _entry(self, row: Sequence[Any]) -> Entry:
        run, identity, records, rate, sigma, delta, steps, patients, seal = row
        entry = Entry(run, identity, records, Use(rate, sigma, steps), delta, patients)
        if self._seal(entry) != seal or self._digest(self._patients(run)) != patients:
            raise self._unusable(f"the row of run {run!r} does not fit its seal")
        return entry

    def _patients(self, run: str) -> list[tuple[bytes, int]]:
        found = self._rows.execute("SELECT patient, records FROM patient WHERE run = ? ORDER BY patient", (run,))
        return found.fetchall()

    def _seal(self, entry: Entry) -> bytes:
        figures = struct.pack("<qdddq", entry.records, entry.use.rate, entry.use.sigma, entry.delta, entry.use.steps)
        return self.secret.derive("row", entry.run, entry.identity, figures, entry.patients).key

    def _digest(self, counts: list[tuple[bytes, int]]) -> bytes:
        return self.secret.derive("patients", *(part for count in counts for part in count)).key

    @contextmanager
    def _trouble(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error, struct.error, TypeError) as error:
            raise self._unusable(explain(error)) from None

    def _unusable(self, reason: str) -> RunError:
        return RunError(612, f"{self._path}: {reason}.", _RESTORE)


def _covers(other: tuple[int, ...], one: tuple[int, ...]) -> bool:
    return other != one and all(map(operator.ge, other, one))
