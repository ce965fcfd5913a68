"""Damaged checkpoints and full disks under real workers: what is whole is used, what is missing is said, nothing
begins again from zero, and the run ends with the same bits."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from nightsplit.console.status import summarise
from nightsplit.console.worker_file import WorkerFile
from nightsplit.shared.run_store.sqlite import SqliteStore
from nightsplit.shared.storage.checkpoint import MANIFEST, TENSORS
from nightsplit.shared.storage.files import write_new
from tests.harness.services import wait_until
from tests.harness.study import change
from tests.harness.workers import Hospital

WORKERS = ("server", "north")


def one_site(folder: Path, store: str = "sqlite:run.db") -> Hospital:
    """A run of one site that takes some seconds, and many checkpoints."""
    return Hospital(folder, store=store, epochs=150, sites=("north",))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """sha256 of every part of the model, trained in peace."""
    return one_site(tmp_path_factory.mktemp("calm") / "run").in_peace()


@pytest.fixture
def hospital(tmp_path: Path) -> Iterator[Hospital]:
    hospital = one_site(tmp_path / "run")
    yield hospital
    hospital.close()


def checkpoints(hospital: Hospital, worker: str) -> list[Path]:
    """Those that are whole by their name, oldest first."""
    return sorted((hospital.folder / "state" / worker / "checkpoints").glob("[0-9]*"))


def counted(hospital: Hospital, worker: str) -> list[Path]:
    """Those that count: a kill may have come between a rename and its pointer."""
    found = checkpoints(hospital, worker)
    if worker == "north":
        return found
    with closing(SqliteStore(hospital.folder / "run.db", "lipids")) as store:
        pointer = store.pointer()
    return [p for p in found if pointer and p.name <= f"{pointer.fence:06d}-{pointer.counter:09d}"]


def wait_for(hospital: Hospital, condition: Callable[[], bool], what: str) -> None:
    try:
        wait_until(condition, 100, what)
    except AssertionError as error:
        raise AssertionError(f"{error}: {hospital.logs()}") from None


def status(hospital: Hospital, worker: str) -> dict[str, Any]:
    """What `nightsplit status --json` says of a worker."""
    summary = summarise(WorkerFile(hospital.folder / "server.toml"))
    return next(line for line in summary["workers"] if line["worker"] == worker)


def kill_in_mid_run(hospital: Hospital, *workers: str) -> list[Path]:
    """kill -9 processes that have written a checkpoint beside an older one; returns the newest of each."""
    before = [place for worker in workers for place in checkpoints(hospital, worker)]

    def have_two() -> bool:
        found = [counted(hospital, worker) for worker in workers]
        return all(len(places) > 1 and places[-1] not in before for places in found)

    wait_for(hospital, have_two, f"two checkpoints of {' and '.join(workers)}")
    for worker in workers:
        assert hospital.processes[worker].poll() is None, f"the run was over too soon: {hospital.logs()}"
        hospital.kill(worker)
    return [counted(hospital, worker)[-1] for worker in workers]


def refuses_to_start(hospital: Hospital, worker: str, *words: str) -> None:
    """The worker leaves with exit code 1 and one line that has these words."""
    log = hospital.folder / f"{worker}.log"
    before = len(log.read_text())
    assert hospital.start(worker).wait(60) == 1
    (line,) = [line for line in log.read_text()[before:].splitlines() if line.startswith("E")]
    assert all(word in line for word in words), line
    assert "Fix: " in line
    assert "Traceback" not in log.read_text()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def half_renamed(place: Path) -> None:
    """What a crash in mid-write leaves: a draft, and not all of it."""
    draft = place.with_name(f".{place.name}.draft")
    shutil.copytree(place, draft, dirs_exist_ok=True)
    (draft / MANIFEST).unlink(missing_ok=True)


Damage = tuple[Callable[[Path], object], str]
PASSED_OVER: list[Damage] = [
    (lambda place: flip(place / TENSORS), "the tensors are damaged"),
    (lambda place: flip(place / MANIFEST), "the manifest is damaged"),
    (lambda place: os.truncate(place / TENSORS, 1000), "the tensors are damaged"),
    (lambda place: os.truncate(place / MANIFEST, 0), "the manifest is damaged"),
    (lambda place: (place / MANIFEST).unlink(), f"{MANIFEST}: No such file or directory"),
    (lambda place: [file.unlink() for file in place.iterdir()], "No such file or directory"),
]
MISSING: Damage = (shutil.rmtree, "is missing")
"""Only a server can know: the run store names its newest checkpoint."""


def passed_over_is_told(hospital: Hospital, worker: str, place: str, words: str) -> None:
    """By the worker itself, and (so far by sites) in its status."""
    said = f"warning: skipped a damaged checkpoint: {place}: "
    log = hospital.folder / f"{worker}.log"
    wait_for(hospital, lambda: said in log.read_text(), f"{worker} to say {said!r}")
    why = log.read_text().split(said)[1].splitlines()[0]
    # A server may have been killed before the run store named its newest checkpoint, which then counts for nothing.
    assert words in why or (worker == "server" and "not the one that the run store names" in why)
    wait_for(hospital, lambda: place in str(status(hospital, worker)["skipped_checkpoints"]), "status to say so")
    out = hospital.call("status", f"{worker}.toml").stdout
    assert f"warning: {worker} skipped a damaged checkpoint: {place}: " in out


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "damages",
    [
        pytest.param([PASSED_OVER[0], MISSING], id="two"),
        pytest.param([*PASSED_OVER, MISSING], id="all", marks=pytest.mark.campaign),
    ],
)
def test_damaged_checkpoints_are_passed_over_and_named(
    hospital: Hospital, undisturbed: dict[str, str], damages: list[Damage]
) -> None:
    """Each kind of damage in turn, to the newest of the server and of the site at once."""
    for name in WORKERS:
        hospital.start(name)
    for damage, words in damages:
        places = dict(zip(WORKERS, kill_in_mid_run(hospital, *WORKERS), strict=True))
        for worker in ("north", "server"):  # without a server the run stands still while the site is looked at
            damage(places[worker])
            half_renamed(checkpoints(hospital, worker)[0])
            hospital.start(worker)
            if worker == "server" or words != MISSING[1]:
                passed_over_is_told(hospital, worker, places[worker].name, words)
    hospital.wait_for_end(200)
    assert hospital.models() == undisturbed


@pytest.mark.campaign
@pytest.mark.timeout(300)
@pytest.mark.parametrize("worker", WORKERS)
def test_with_no_checkpoint_left_nothing_begins_from_zero(
    hospital: Hospital, worker: str, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    for name in WORKERS:
        hospital.start(name)
    hospital.wait_for_steps(300)  # the site has told what it has saved: before, the server has all that it would need
    kill_in_mid_run(hospital, worker)
    folder = hospital.folder / "state" / worker / "checkpoints"
    shutil.copytree(folder, tmp_path / "backup")
    for place in checkpoints(hospital, worker):
        flip(place / TENSORS)
    for _ in range(2):
        refuses_to_start(hospital, worker, "E502 No valid checkpoint is left", "the tensors are damaged")
        assert worker == "server" or status(hospital, worker)["detail"] == "E502 No valid checkpoint is left"
    shutil.rmtree(folder)
    if worker == "server":
        refuses_to_start(hospital, worker, "E502 No valid checkpoint is left", "is missing")
    else:
        refuses_to_start(hospital, worker, "E504 Site lost its state", "is at answer 0, but had stored")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tmp_path / "backup", folder)
    hospital.start(worker)
    hospital.wait_for_end(200)
    assert hospital.models() == undisturbed


class Disk:
    """A file system of 96 MB that only a test fills."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ballast = folder / "ballast"

    def fill(self, leave_bytes: int = 0) -> None:
        """Take all room but so much."""
        with self._ballast.open("wb", buffering=0) as file:
            try:
                while os.statvfs(self.folder).f_bavail * os.statvfs(self.folder).f_frsize > leave_bytes:
                    file.write(bytes(4096))
            except OSError:
                pass

    def make_room(self) -> None:
        self._ballast.unlink()


@pytest.fixture
def mount(hospital: Hospital) -> Iterator[Callable[[str], Disk]]:
    """Lay a small disk over a folder of the run."""
    if os.geteuid() != 0:
        pytest.skip("filling a disk needs a small file system, and mounting one needs root")
    with ExitStack() as mounted:

        def mount(name: str) -> Disk:
            folder = hospital.folder / name
            folder.mkdir(parents=True, exist_ok=True)
            kept = {file.name: file.read_bytes() for file in folder.iterdir()}  # the seed of a site
            done = subprocess.run(
                ["mount", "-t", "tmpfs", "-o", "size=96m,mode=755", "tmpfs", str(folder)],
                capture_output=True,
                text=True,
            )
            if done.returncode != 0:
                pytest.skip(f"filling a disk needs a small file system, and mount says: {done.stderr.strip()}")
            mounted.callback(subprocess.run, ["umount", str(folder)], check=True)
            mounted.callback(hospital.close)
            for file, content in kept.items():
                write_new(folder / file, content)
            return Disk(folder)

        yield mount


@pytest.mark.campaign
@pytest.mark.timeout(300)
@pytest.mark.parametrize("worker", WORKERS)
def test_a_disk_that_is_full_at_a_checkpoint(
    hospital: Hospital, worker: str, undisturbed: dict[str, str], mount: Callable[[str], Disk]
) -> None:
    disk = mount(f"state/{worker}")
    for name in WORKERS:
        hospital.start(name)
    wait_for(hospital, lambda: len(checkpoints(hospital, worker)) > 1, "two checkpoints")
    disk.fill()
    assert hospital.processes[worker].wait(60) == 1, hospital.logs()
    whole = {place.name for place in checkpoints(hospital, worker)}
    said = (hospital.folder / f"{worker}.log").read_text().splitlines()[-1]
    assert said.startswith("E501 File cannot be written: ")
    of_checkpoint = "is full; a checkpoint needs 0.0" in said and "MiB. The last checkpoint is intact." in said
    assert of_checkpoint or "nothing leaves without a line in it" in said, said
    refuses_to_start(hospital, worker, "E501 File cannot be written")
    assert {place.name for place in checkpoints(hospital, worker)} == whole
    disk.make_room()
    hospital.start(worker)
    hospital.wait_for_end(200)
    assert hospital.models() == undisturbed
    assert "passed over" not in hospital.logs()


@pytest.mark.campaign
@pytest.mark.timeout(300)
def test_a_disk_that_is_full_under_the_run_store(
    hospital: Hospital, undisturbed: dict[str, str], mount: Callable[[str], Disk]
) -> None:
    """No checkpoint counts without it, so the server leaves; a site trains on without it."""
    disk = mount("store")
    for name in WORKERS:
        change(hospital.folder / f"{name}.toml", "sqlite:run.db", "sqlite:store/run.db")
        hospital.start(name)
    wait_for(hospital, lambda: len(checkpoints(hospital, "server")) > 1, "two checkpoints")
    disk.fill()
    assert hospital.processes["server"].wait(60) == 1, hospital.logs()
    said = (hospital.folder / "server.log").read_text().splitlines()[-1]
    assert said.startswith("E207 Run store cannot be reached: ")
    assert "disk is full" in said
    assert "64 MiB of free space" in said
    refuses_to_start(hospital, "server", "E207", "disk is full")
    assert hospital.processes["north"].poll() is None
    disk.make_room()
    hospital.start("server")
    hospital.wait_for_end(200)
    assert hospital.models() == undisturbed


@pytest.mark.campaign
@pytest.mark.timeout(300)
def test_a_disk_that_is_full_under_the_broker(
    hospital: Hospital, undisturbed: dict[str, str], mount: Callable[[str], Disk]
) -> None:
    """Nobody leaves and nobody has to be started again: the work goes on when there is room."""
    disk = mount("broker")
    for name in WORKERS:
        hospital.start(name)
    hospital.wait_for_steps(50)
    disk.fill(leave_bytes=2**20)

    def blocked() -> bool:
        lines = [status(hospital, name) for name in WORKERS]
        said = [line["detail"] for line in lines if line["state"] == "blocked"]
        return any(why.startswith("disk is full (") and "64 MiB have to be free" in why for why in said)

    wait_for(hospital, blocked, "status to say so")
    assert "BLOCKED: disk is full" in hospital.call("status", "server.toml").stdout
    steps = hospital.steps
    disk.make_room()
    hospital.wait_for_end(200)
    assert hospital.steps > steps
    assert hospital.models() == undisturbed
