"""The durable ledger of the privacy that all runs have spent on a site's data.

It has one row per run, also for failed runs and trials, which have used the data, too. A row holds the number of steps
that are paid for, before weights that contain them leave the site; paying again in a replay after a crash costs
nothing. A second table holds the number of records of each patient in a run, under a keyed hash.

Each row has a seal, a hash keyed with the site's secret, so that damaged and forged rows are detected.
"""

import operator
import sqlite3
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nightsplit.shared.errors import RunError
from nightsplit.shared.storage.files import rename_durably
from nightsplit.shared.storage.sqlite import explain, open_database, transaction
from nightsplit.site_worker.privacy.accounting import Epsilon, Use, epsilon_of, patient_epsilon
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
    """Row of a run in the ledger.

    Attributes:
        identity: keyed hash of the run's digest and training data, on which its noise depends.
        records: number of the site's training records.
        use: rate, noise, and the steps that are paid for.
        patients: keyed hash of the patients and their numbers of records.
    """

    run: str
    identity: bytes
    records: int
    use: Use
    delta: float
    patients: bytes


@dataclass(frozen=True)
class Total:
    """Epsilon of several runs together.

    Attributes:
        delta: smallest delta of any run; None if there is no run.
        record: epsilon of a record that was in all runs.
        patient: largest epsilon of a patient, for all records together.
        patient_records: largest number of records of this patient in a run.
    """

    delta: float | None
    record: Epsilon
    patient: float
    patient_records: int


class Ledger:
    """Ledger of a site, created with its secret if both are missing; RunError 612 if it cannot be used.

    The ledger is a SQLite file; the secret is beside it, with the suffix .key. Processes of one host may share both.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        key = path.with_suffix(".key")
        with self._errors(), ExitStack() as opened:
            self._rows = opened.enter_context(closing(open_database(path, _SCHEMA)))
            if self._rows.execute("PRAGMA quick_check").fetchone() != ("ok",):
                raise self._error("the file is damaged")
            self.secret = self._open_secret(key)
            opened.pop_all()

    def close(self) -> None:
        """Close the file."""
        self._rows.close()

    def begin(
        self, run: str, identity: str, use: Use, delta: float, patients: Sequence[str], epsilon_max: float | None
    ) -> Entry:
        """Return the entry of a run, after making one without steps for a new run.

        Args:
            identity: text that must not change under this id: the run's digest and the training data's fingerprint.
            use: rate, noise, and all planned steps. An existing entry keeps its noise.
            patients: patient of each training record.
            epsilon_max: largest epsilon that all runs together may spend on a record; None without limit.

        Raises:
            RunError: 611 the planned steps would exceed `epsilon_max`; 612; 613 the id was used with another identity.
        """
        counts = sorted((self.secret.derive("patient", name).key, n) for name, n in Counter(patients).items())
        keyed = self.secret.derive("identity", identity).key
        entry = Entry(run, keyed, len(patients), replace(use, steps=0), delta, self._digest(counts))
        with self._errors():
            entries = {other.run: other for other in self.entries()}
            found = entries.get(run, entry)
            if (found.identity, found.patients) != (entry.identity, entry.patients):
                remedy = "give the new run another run.id; what the old one spent stays counted."
                raise RunError(613, f"run {run!r} is in {self._path} with other data, patients or settings.", remedy)
            planned = replace(found, use=replace(found.use, steps=use.steps))
            self._check_budget(epsilon_max, {**entries, run: planned}, run)
            if run not in entries:
                with transaction(self._rows):
                    row = (run, keyed, entry.records, use.rate, use.sigma, delta, 0, entry.patients, self._seal(entry))
                    self._rows.execute("INSERT INTO run VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
                    self._rows.executemany("INSERT INTO patient VALUES (?, ?, ?)", [(run, *c) for c in counts])
        return found

    def spend(self, run: str, steps: int, epsilon_max: float | None) -> None:
        """Pay for the steps 1 to `steps` of a run with an entry; steps paid before cost nothing more.

        RunError 611 if all runs together would exceed `epsilon_max`; then nothing is written.
        """
        with self._errors():
            while True:
                before = self.entries()
                entries = {entry.run: entry for entry in before}
                if run not in entries:
                    raise self._error(f"run {run!r} is missing from it")
                if steps <= entries[run].use.steps:
                    return
                paid = replace(entries[run], use=replace(entries[run].use, steps=steps))
                self._check_budget(epsilon_max, {**entries, run: paid}, run)
                # The check is slow and does not lock the file: repeat it if another process wrote meanwhile.
                with transaction(self._rows):
                    if self.entries() == before:
                        row = (steps, self._seal(paid), run)
                        self._rows.execute("UPDATE run SET steps = ?, seal = ? WHERE run = ?", row)
                        return

    def entries(self) -> list[Entry]:
        """Return all entries, oldest first; RunError 612 if they cannot be read."""
        with self._errors():
            return [self._parse_entry(row) for row in self._rows.execute("SELECT * FROM run ORDER BY rowid").fetchall()]

    def total(self, run: str | None = None) -> Total:
        """Return the epsilon of all runs together, or of one run; RunError 612 if the entries cannot be read."""
        entries = [entry for entry in self.entries() if entry.use.steps and run in (None, entry.run)]
        if not entries:
            return Total(None, Epsilon(0.0, 0.0), 0.0, 0)
        delta = min(entry.delta for entry in entries)
        uses = [entry.use for entry in entries]
        with self._errors():
            shares = [dict(self._read_patients(entry.run)) for entry in entries]
        # Only profiles (records in each run) that no other dominates can have the largest epsilon.
        profiles = {tuple(share.get(patient, 0) for share in shares) for patient in set().union(*shares)}
        largest = [profile for profile in profiles if not any(_dominates(other, profile) for other in profiles)]
        worst = max((patient_epsilon(list(zip(uses, each, strict=True)), delta), max(each)) for each in largest)
        return Total(delta, epsilon_of(uses, delta), *worst)

    def _check_budget(self, epsilon_max: float | None, entries: dict[str, Entry], run: str) -> None:
        if epsilon_max is None:
            return
        delta = min(entry.delta for entry in entries.values())
        spent = epsilon_of([entry.use for entry in entries.values()], delta).pld
        if spent > epsilon_max:
            limit = f"over all {len(entries)} runs (delta {delta:g}); policy.toml allows {epsilon_max:g}."
            sentence = f"run {run!r} would bring the epsilon of a record to {spent:.3g} {limit}"
            remedy = "plan it with a smaller privacy.epsilon; only the hospital may raise max_epsilon."
            raise RunError(611, sentence, f"let the run end here, or {remedy}")

    def _open_secret(self, key: Path) -> Secret:
        """Read the secret of this ledger, or make one for a new ledger.

        A new secret has another name until the ledger knows it, so that a crash leaves neither without the other.
        """
        new = key.with_suffix(".new")
        with transaction(self._rows):
            if not key.exists() and not self._proofs():
                new.unlink(missing_ok=True)
                self._rows.execute("INSERT INTO owner VALUES (?)", (make_secret(new).derive("ledger").key,))
        with transaction(self._rows):
            if new.exists() and not key.exists():
                rename_durably(new, key)
            if not key.exists():
                raise self._error(f"its secret {key} is missing")
            secret = read_secret(key)
            if self._proofs() != [(secret.derive("ledger").key,)]:
                raise self._error(f"it is empty, or was not made with {key}")
        return secret

    def _proofs(self) -> list[tuple[bytes]]:
        return self._rows.execute("SELECT proof FROM owner").fetchall()

    def _parse_entry(self, row: Sequence[Any]) -> Entry:
        run, identity, records, rate, sigma, delta, steps, patients, seal = row
        entry = Entry(run, identity, records, Use(rate, sigma, steps), delta, patients)
        if self._seal(entry) != seal or self._digest(self._read_patients(run)) != patients:
            raise self._error(f"the row of run {run!r} does not fit its seal")
        return entry

    def _read_patients(self, run: str) -> list[tuple[bytes, int]]:
        found = self._rows.execute("SELECT patient, records FROM patient WHERE run = ? ORDER BY patient", (run,))
        return found.fetchall()

    def _seal(self, entry: Entry) -> bytes:
        numbers = struct.pack("<qdddq", entry.records, entry.use.rate, entry.use.sigma, entry.delta, entry.use.steps)
        return self.secret.derive("row", entry.run, entry.identity, numbers, entry.patients).key

    def _digest(self, counts: list[tuple[bytes, int]]) -> bytes:
        return self.secret.derive("patients", *(part for count in counts for part in count)).key

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Raise RunError 612 for an error of the file."""
        try:
            yield
        except (OSError, sqlite3.Error, struct.error, TypeError) as error:
            raise self._error(explain(error)) from None

    def _error(self, reason: str) -> RunError:
        return RunError(612, f"{self._path}: {reason}.", _RESTORE)


def _dominates(other: tuple[int, ...], profile: tuple[int, ...]) -> bool:
    return other != profile and all(map(operator.ge, other, profile))
