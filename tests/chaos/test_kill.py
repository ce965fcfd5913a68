"""kill -9 of sites and server in mid-run; the same command goes on; the strict run ends bit-identical."""

import pytest

from tests.workers import Hospital

SCHEDULE = [(25, "server"), (80, "north"), (140, "server"), (200, "south"), (260, "server")]
"""After so many lines of metrics, who dies."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """sha256 of every part of the model, trained in peace over the embedded broker."""
    hospital = Hospital(tmp_path_factory.mktemp("calm") / "run")
    for worker in ("server", "north", "south", "east"):
        hospital.start(worker)
    hospital.wait_for_end()
    return hospital.models()


@pytest.fixture(params=["embedded", "rabbitmq"])
def hospital(request, tmp_path):
    addresses = {}
    if request.param == "rabbitmq":
        node, redis = request.getfixturevalue("rabbitmq"), request.getfixturevalue("redis_server")
        addresses = {"broker": node.vhost(), "store": redis.url}
    hospital = Hospital(tmp_path / "run", **addresses)
    yield hospital
    hospital.close()


@pytest.mark.timeout(300)
def test_killed_workers_end_bit_identical(undisturbed, hospital):
    for worker in ("server", "north", "south", "east"):
        hospital.start(worker)
    for steps, worker in SCHEDULE:
        hospital.wait_for_steps(steps)
        assert hospital.processes[worker].poll() is None, hospital.logs()
        hospital.kill(worker)
        hospital.start(worker)
    hospital.wait_for_end()
    assert hospital.models() == undisturbed
    assert set(undisturbed) == {
        "report/top.safetensors",
        *(
            f"state/{site}/model/{part}.safetensors"
            for site in ("north", "south", "east")
            for part in ("bottom", "top")
        ),
    }
