"""Several runs, and many sites, on one RabbitMQ node and one Redis."""

from collections import Counter

import pytest

from benchmarks.speed.crowd import Crowd
from benchmarks.speed.scaling import night_and_day, unfairness
from tests.harness.approvals import approve_all
from tests.harness.workers import SHARES, Hospital

EPOCHS = 4
RUNS = {"ldl": 5, "glucose": 6}
"""Two runs with the same sites, by their seeds."""


def hospital_of(folder, run, **addresses):
    hospital = Hospital(folder / run, epochs=EPOCHS, **addresses)
    place = hospital.folder / "run.toml"
    place.write_text(
        place.read_text().replace('id = "lipids"', f'id = "{run}"').replace("seed = 5", f"seed = {RUNS[run]}")
    )
    approve_all(hospital.folder)
    return hospital


@pytest.mark.timeout(300)
def test_two_runs_at_once_do_not_disturb_each_other(rabbitmq, redis_server, tmp_path):
    alone = {run: hospital_of(tmp_path / "alone", run).in_peace() for run in RUNS}
    assert alone["ldl"] != alone["glucose"]
    url = rabbitmq.vhost()
    hospitals = [hospital_of(tmp_path / "together", run, broker=url, store=redis_server.url) for run in RUNS]
    try:
        for worker in ("server", *SHARES):
            for hospital in hospitals:
                hospital.start(worker)
        for hospital in hospitals:
            hospital.wait_for_end(200)
        assert {hospital.folder.name: hospital.models() for hospital in hospitals} == alone
    finally:
        for hospital in hospitals:
            hospital.close()


@pytest.mark.campaign
@pytest.mark.timeout(300)
def test_many_sites_with_a_backlog_get_the_share_of_their_weight(rabbitmq, redis_server, tmp_path):
    crowd = Crowd(sites=12, batches=1800)
    order = night_and_day(crowd, tmp_path, rabbitmq.vhost(), redis_server.url).order
    assert Counter(order) == crowd.planned
    assert unfairness(order, crowd.planned) <= 0.02


def test_unfairness_is_seen():
    planned = {"near": 100, "far": 300}
    assert unfairness(["near", "far", "far", "far"] * 100, planned) < 0.02
    assert unfairness(["near"] * 100 + ["far"] * 300, planned) > 0.02
