"""What the commands write is their user's alone, whatever the umask: it may hold something of a patient."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.modes import open_to_others
from tests.harness.processes import Fresh
from tests.harness.study import change
from tests.harness.workers import Hospital

SITES = ("north", "south")


@pytest.fixture(
    params=[
        pytest.param((0o000, "split_labels"), id="umask 000"),
        pytest.param((0o022, "split_frozen"), id="umask 022", marks=pytest.mark.campaign),
    ]
)
def hospital(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Hospital]:
    """The processes begin as a user begins them: with a umask that they inherit."""
    umask, protocol = request.param
    hospital = Hospital(tmp_path / "study", protocol=protocol, sites=SITES, epochs=3, begin=Fresh)
    change(hospital.folder / "run.toml", "export_top = true\n", "export_top = true\ntape = true\n")
    change(hospital.folder / "policy.toml", "server_sets_weights = true", "server_sets_weights = true\ntape = true")
    for worker in ("server", *SITES):
        (hospital.folder / f"{worker}.log").touch()  # redirected by a shell, not written by us
    (hospital.folder / "state").chmod(0o700)  # made by the test, with the seeds in it
    before = os.umask(umask)
    yield hospital
    os.umask(before)
    hospital.close()


@pytest.mark.timeout(300)
def test_a_run_from_its_opening_to_predictions(hospital: Hospital) -> None:
    given = set(hospital.folder.iterdir()) - {hospital.folder / "state"}  # the seeds are in it

    def written() -> set[Path]:
        return set(hospital.folder.iterdir()) - given

    assert hospital.call("open", "server.toml").returncode == 0
    assert open_to_others(*written()) == []
    for worker in SITES:
        hospital.start(worker)
    hospital.start("server")
    hospital.wait_for_steps(3, 120)
    assert open_to_others(*written()) == []
    hospital.wait_for_end(200)
    predicted = hospital.call("predict", "north.toml", "--output", "predictions/north.csv")
    assert predicted.returncode == 0, predicted.stderr
    names = {str(path.relative_to(hospital.folder)) for place in written() for path in (place, *place.rglob("*"))}
    assert {
        "run.db", "broker/broker.sqlite", "broker/bodies", "state/north/data.sha256", "state/north/model",
        "state/north/checkpoints", "state/server/tape/000001.tape", "report/report.json", "report/curves.png",
        "report/tensorboard", "predictions/north.csv",
    } <= names  # fmt: skip
    assert open_to_others(*written()) == []
