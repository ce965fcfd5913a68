"""The ledger: what is paid for stays paid, whatever dies and however often it is replayed."""

import random
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from nightsplit.shared.errors import RunError
from nightsplit.site_worker.privacy.accounting import Use, epsilon_of, patient_epsilon
from nightsplit.site_worker.privacy.ledger import Entry, Ledger
from tests.harness.processes import open_files

ROOT = Path(__file__).parents[2]
USE = Use(0.05, 1.0, 100)
PATIENTS = ["anna", "anna", "anna", "bert", "bert", "carl"]


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with closing(Ledger(tmp_path / "ledger.db")) as ledger:
        yield ledger


def begin(ledger: Ledger, run: str, use: Use = USE, most: float | None = None, patients: list[str] = PATIENTS) -> None:
    ledger.begin(run, f"contract of {run}", use, 1e-4, patients, most)


def steps_of(ledger: Ledger) -> dict[str, int]:
    return {entry.run: entry.use.steps for entry in ledger.entries()}


def number_of(caught: pytest.ExceptionInfo[RunError]) -> int:
    return caught.value.number


def test_steps_are_paid_once(ledger: Ledger, tmp_path: Path) -> None:
    begin(ledger, "one")
    assert steps_of(ledger) == {"one": 0}
    for steps in (8, 16, 8, 16, 24):
        ledger.spend("one", steps, None)
    begin(ledger, "one")
    assert steps_of(ledger) == {"one": 24}
    ledger.close()
    with closing(Ledger(tmp_path / "ledger.db")) as again:
        assert steps_of(again) == {"one": 24}
        assert again.total().record == epsilon_of([Use(0.05, 1.0, 24)], 1e-4)


def test_all_runs_count(ledger: Ledger) -> None:
    for run, sigma in (("tuning", 2.0), ("main", 1.0)):
        begin(ledger, run, Use(0.05, sigma, 100))
        ledger.spend(run, 50, None)
    both = epsilon_of([Use(0.05, 2.0, 50), Use(0.05, 1.0, 50)], 1e-4)
    assert ledger.total().record == both
    assert both.pld > ledger.total("main").record.pld


def test_the_patient_who_lost_most(ledger: Ledger) -> None:
    """Anna has three records in one run; Bert has two there and three in another."""
    for run, patients in (("one", PATIENTS), ("two", ["bert", "bert", "bert", "dora"])):
        begin(ledger, run, patients=patients)
        ledger.spend(run, 100, None)
    anna = patient_epsilon([(USE, 3)], 1e-4)
    bert = patient_epsilon([(USE, 2), (USE, 3)], 1e-4)
    assert bert > anna
    total = ledger.total()
    assert total.patient == pytest.approx(bert)
    assert total.patient_records == 3


def test_no_name_of_a_patient_is_in_the_file(ledger: Ledger, tmp_path: Path) -> None:
    begin(ledger, "one")
    ledger.close()
    assert b"anna" not in (tmp_path / "ledger.db").read_bytes()


def test_the_policy_stops_a_run_and_nothing_is_written(ledger: Ledger) -> None:
    begin(ledger, "one", most=10.0)
    ledger.spend("one", 50, 10.0)
    most = epsilon_of([Use(0.05, 1.0, 60)], 1e-4).pld
    ledger.spend("one", 60, most)
    with pytest.raises(RunError, match=r"'one' would bring .* policy\.toml allows") as caught:
        ledger.spend("one", 61, most)
    assert number_of(caught) == 611
    assert steps_of(ledger) == {"one": 60}
    ledger.spend("one", 60, most)  # a replay of what was paid for goes on


def test_a_run_that_the_policy_would_stop_on_its_way_does_not_begin(ledger: Ledger) -> None:
    begin(ledger, "one")
    ledger.spend("one", 100, None)
    most = epsilon_of([USE, Use(0.05, 1.0, 99)], 1e-4).pld
    with pytest.raises(RunError) as caught:
        begin(ledger, "two", most=most)
    assert number_of(caught) == 611
    assert steps_of(ledger) == {"one": 100}
    begin(ledger, "two", Use(0.05, 1.0, 99), most=most)


def test_one_id_is_one_run(ledger: Ledger) -> None:
    begin(ledger, "one")
    for identity, patients in (("another contract", PATIENTS), ("contract of one", PATIENTS[1:])):
        with pytest.raises(RunError) as caught:
            ledger.begin("one", identity, USE, 1e-4, patients, None)
        assert number_of(caught) == 613
    assert steps_of(ledger) == {"one": 0}


def test_a_run_keeps_its_first_noise(ledger: Ledger) -> None:
    begin(ledger, "one")
    again = ledger.begin("one", "contract of one", Use(0.05, 1.01, 100), 1e-4, PATIENTS, None)
    assert again.use.sigma == 1.0


def spend_until_killed(path: Path) -> None:
    """Pay step by step, and say so after each. Runs in a process of its own."""
    ledger = Ledger(path)
    begin(ledger, "one")
    for step in range(1, 10**6):
        ledger.spend("one", step, None)
        print(step, flush=True)


def test_kill_9_forgets_no_payment(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    code = f"from tests.site_worker.test_privacy_ledger import *; spend_until_killed(Path({str(path)!r}))"
    said = 0
    for pause in range(3):
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            said = max(said, int(line))
            if int(line) >= 20 * (pause + 1):
                process.send_signal(signal.SIGKILL)
                break
        # What it said between the last line read and its death counts as well.
        said = max([said, *map(int, process.stdout.read().split("\n")[:-1])])
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        with closing(Ledger(path)) as ledger:
            assert steps_of(ledger)["one"] in (said, said + 1)


def test_runs_of_one_site_at_the_same_time(ledger: Ledger, tmp_path: Path) -> None:
    """Both may spend alone, and not together: whoever comes second is stopped, and the cap holds."""
    most = epsilon_of([USE, Use(0.05, 1.0, 50)], 1e-4).pld
    runs = ("one", "two", "three")
    for run in runs:
        begin(ledger, run)
    stopped: list[int] = []

    def spend(run: str) -> None:
        with closing(Ledger(tmp_path / "ledger.db")) as own:
            try:
                for steps in range(20, 101, 20):
                    own.spend(run, steps, most)
            except RunError as error:
                stopped.append(error.number)

    threads = [threading.Thread(target=spend, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(stopped) == {611}
    assert ledger.total().record.pld <= most
    assert sum(steps_of(ledger).values()) > 130  # 150 fit, and the last was stopped less than 20 before


@pytest.mark.parametrize("is_known", [True, False])
def test_a_ledger_whose_creation_a_crash_interrupted_opens(tmp_path: Path, is_known: bool) -> None:
    """The crash came before or after the ledger knew its new secret, which has another name until then."""
    path = tmp_path / "ledger.db"
    with closing(Ledger(path)) as ledger:
        before = ledger.secret
        if not is_known:
            ledger._rows.execute("DELETE FROM owner")
    path.with_suffix(".key").rename(path.with_suffix(".new"))
    with closing(Ledger(path)) as ledger:
        begin(ledger, "first")
        assert (ledger.secret == before) is is_known
    assert path.with_suffix(".key").exists()
    assert not path.with_suffix(".new").exists()


def test_sites_that_start_at_once_share_one_secret(tmp_path: Path) -> None:
    secrets = []

    def start() -> None:
        with closing(Ledger(tmp_path / "ledger.db")) as ledger:
            secrets.append(ledger.secret)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(secrets) == 8
    assert len(set(secrets)) == 1


def filled(path: Path) -> None:
    with closing(Ledger(path)) as ledger:
        begin(ledger, "one")
        ledger.spend("one", 60, None)


def entries_or_number(path: Path) -> list[Entry] | int:
    try:
        with closing(Ledger(path)) as ledger:
            return ledger.entries()
    except RunError as error:
        return error.number


def test_a_bit_that_flipped_is_found_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    filled(path)
    good, entries = path.read_bytes(), entries_or_number(path)
    # Where the rows are, and as many places anywhere.
    row = good.index(b"one") - 8
    places = [*range(row, row + 200), *random.Random(1).sample(range(len(good)), 200)]
    found = 0
    for place in places:
        for rest in ("-wal", "-shm"):
            path.with_name(f"ledger.db{rest}").unlink(missing_ok=True)
        path.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        seen = entries_or_number(path)
        assert seen in (entries, 612), place
        found += seen == 612
    assert found > 100


@pytest.mark.parametrize("damage", ["cut", "emptied", "gone", "other text", "key gone", "key of another"])
def test_a_ledger_that_lost_something_is_refused(tmp_path: Path, damage: str) -> None:
    path, key = tmp_path / "ledger.db", tmp_path / "ledger.key"
    filled(path)
    filled(tmp_path / "other.db")
    content = path.read_bytes()
    if damage == "key gone":
        key.unlink()
    elif damage == "key of another":
        (tmp_path / "other.key").replace(key)
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut": content[: len(content) // 2], "emptied": b"", "other text": b"x" * 9000}[damage])
    for _ in range(2):  # the second time as well: nothing was made new
        with pytest.raises(RunError) as caught:
            Ledger(path)
        assert number_of(caught) == 612
        assert open_files(tmp_path) == []


def test_a_row_that_somebody_changed_is_refused(tmp_path: Path) -> None:
    for change in ("UPDATE run SET steps = 1", "UPDATE patient SET records = 1", "DELETE FROM patient"):
        path = tmp_path / change.split()[1] / f"{len(change)}.db"
        filled(path)
        rows = sqlite3.connect(path)
        rows.execute(change)
        rows.commit()
        rows.close()
        with closing(Ledger(path)) as ledger, pytest.raises(RunError, match="seal") as caught:
            ledger.entries()
        assert number_of(caught) == 612


def test_a_ledger_that_is_held_too_long_is_refused_with_a_reason(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.db"
    filled(path)
    monkeypatch.setattr("nightsplit.shared.storage.sqlite.BUSY_SECONDS", 0.2)
    with closing(sqlite3.connect(path, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(RunError, match="another process") as caught:
            ledger.spend("one", 70, None)
        assert number_of(caught) == 612
    ledger.spend("one", 70, None)
    assert steps_of(ledger) == {"one": 70}
