"""kill -9 of anybody, blind and at every named point of the code; the run ends as if nothing had happened.

The long campaigns of tests/faults/chaos.py, made short: one seed each, and together every crash point.
"""

import json

import pytest

from nightsplit.shared.crash_points import POINTS
from nightsplit.shared.storage.files import write_atomic
from nightsplit.shared.wire.message import SERVER
from tests.faults.chaos import Campaign, carry_out, passed, undisturbed
from tests.faults.nemesis import Watch, clockwork, schedule
from tests.faults.oracle import count
from tests.harness.processes import Process
from tests.harness.workers import SHARES

EPOCHS = 50
EMBEDDED, RABBITMQ, FAIR = POINTS[:3], POINTS[3:6], POINTS[6:]


def campaign(**settings):
    return Campaign(kills=8, seed=6, epochs=EPOCHS, begin=Process, **settings)


def reached(result, points):
    return all(f"{kind} {point}" in result["points"] for kind in ("server", "site") for point in points)


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """The strict run in peace."""
    return undisturbed(campaign(), tmp_path_factory.mktemp("calm") / "run")


@pytest.mark.timeout(300)
def test_embedded_in_strict_order(calm, tmp_path):
    result = carry_out(campaign(points=EMBEDDED), tmp_path, calm)
    assert passed(result), result
    assert result["kills"] >= 8, result
    assert reached(result, EMBEDDED), result


@pytest.mark.campaign
@pytest.mark.rabbitmq
@pytest.mark.redis
@pytest.mark.timeout(300)
def test_rabbitmq_in_strict_order_with_deaths_of_the_broker(calm, tmp_path):
    result = carry_out(campaign(points=RABBITMQ, broker="rabbitmq", broker_kills=2), tmp_path, calm)
    assert passed(result), result
    assert result["kills"] >= 8, result
    assert result["broker_kills"] == 2, result
    assert reached(result, RABBITMQ), result


@pytest.mark.campaign
@pytest.mark.timeout(300)
def test_embedded_in_fair_order_equals_the_replay_of_its_journal(tmp_path):
    result = carry_out(campaign(points=FAIR, order="fair"), tmp_path)
    assert passed(result), result
    assert result["kills"] >= 8, result
    assert reached(result, FAIR), result


@pytest.mark.campaign
@pytest.mark.rabbitmq
@pytest.mark.redis
@pytest.mark.timeout(300)
def test_rounds_over_rabbitmq(tmp_path):
    settings = {"broker": "rabbitmq", "protocol": "fedavg_transfer", "begin": Process}
    result = carry_out(Campaign(kills=5, seed=3, **settings), tmp_path)
    assert passed(result), result
    assert result["kills"] >= 5, result


@pytest.mark.timeout(300)
@pytest.mark.parametrize("protocol", ["split_labels", "split_u"])
def test_workers_die_in_the_middle_of_a_fit(protocol, tmp_path):
    settings = {"protocol": protocol, "learning": "targets", "epochs": 12, "begin": Process}
    result = carry_out(Campaign(kills=6, seed=4, **settings), tmp_path)
    assert passed(result), result
    assert result["kills"] >= 6, result


def test_the_oracle_looks_at_every_part_of_the_model(calm):
    models = {f"state/{site}/model/{part}.safetensors" for site in SHARES for part in ("bottom", "top")}
    last_states = {f"state/{worker}/checkpoints" for worker in (SERVER, *SHARES)}
    assert set(calm.weights) == {"report/top.safetensors", *models, *last_states}


def test_the_oracle_counts_what_is_missing_and_what_is_there_again():
    report = {
        "protocol": "split_labels",
        "sites": {"north": {"messages": 5, "planned": 5, "refused": 0, "training_samples": 32}},
        "history": [{"epoch": 1}, {"epoch": 2}],
    }
    lines = [{"event": "train", "site": "north", "step": n, "epoch": (n + 1) // 2} for n in (1, 2, 3, 4)]
    lines.append({"event": "evaluate", "site": "north", "part": "test", "step": 4, "epoch": 2})
    assert count(report, {"north": 5}, lines) == (0, 0)
    assert count(report, {"north": 3}, lines) == (2, 0), "two answers never reached the site"
    assert count(report, {"north": 5}, lines[1:]) == (1, 0), "a training step is missing"
    assert count(report, {"north": 5}, [*lines, lines[-1]]) == (0, 1), "an evaluation came again"
    assert count(report, {"north": 5}, [*lines, {**lines[0], "step": 5}]) == (0, 1), "a batch was learned again"
    report["sites"]["north"]["messages"] = 6
    assert count(report, {"north": 5}, lines) == (0, 1)


def test_a_schedule_is_a_function_of_its_seed():
    strikes = schedule(seed=3, kills=50, broker_kills=5)
    assert strikes == schedule(seed=3, kills=50, broker_kills=5) != schedule(seed=4, kills=50, broker_kills=5)
    assert sum(len(strike.victims) for strike in strikes) == 50
    assert sum(strike.service == "broker" for strike in strikes) == 5
    assert [strike.at for strike in strikes] == sorted(strike.at for strike in strikes)


def test_one_kill_every_ten_seconds_is_of_one_worker():
    strikes = clockwork(seed=3, kills=4, seconds=10.0)
    assert [strike.at for strike in strikes] == [1000, 2000, 3000, 4000]
    assert all(len(strike.victims) == 1 for strike in strikes)


def test_steps_that_a_restarted_server_makes_again_are_counted_again(tmp_path):
    def lines(*steps):
        return "".join(json.dumps({"event": "train", "step": step, "site": "north"}) + "\n" for step in steps)

    log = tmp_path / "metrics.jsonl"
    log.write_text(lines(1))
    watch = Watch(log)
    watch.news()
    with log.open("a") as file:
        file.write(lines(2, 3))
    assert len(watch.news()) == 2
    with log.open("a") as file:
        file.write(lines(4))  # not seen before the server dies
    write_atomic(log, lines(1, 2).encode())  # what the next one keeps
    assert watch.news() == []
    with log.open("a") as file:
        file.write(lines(3, 4, 5))
    watch.news()
    watch.close()
    assert (watch.step, watch.made) == (5, 6), "steps 2, 3, 4, and 3, 4, 5"
