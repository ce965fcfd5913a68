"""Sites that come back too late, that are too few, or slow: who is waited for, and who holds nobody back."""

import pytest

from nightsplit.shared.wire.message import SERVER
from tests.harness.ward import Ward, decided, replace_run, ward_config

# -- late return -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["strict", "fair"])
def test_a_site_that_comes_back_is_told_and_changes_nothing(order, tmp_path):
    config = replace_run(ward_config(order=order), epochs=4)  # so that the others are still at work when it returns
    ward = Ward(config, tmp_path / "returns", {"south": 5})
    while not decided(ward):
        ward.turn((SERVER, *config.run.sites)[ward.turns % 4])
    applied = ward.server.applied["south"]
    ward.goes = {}
    for number in range(5000):
        if ward.over:
            break
        ward.turn((SERVER, *config.run.sites)[number % 4])
    error = ward.told["south"]
    assert error.number == 608
    assert "silent for 0.2 h" in str(error)
    assert ward.server.applied["south"] == applied
    ward.goes = {"south": 5}
    if order == "strict":
        assert ward.outcome() == Ward(config, tmp_path / "gone", {"south": 5}).run().outcome()
    assert ward.broker.depth(ward.queues["south"].up) == 0, "its late messages are acknowledged"


def test_a_site_that_comes_back_when_all_is_over_is_told(tmp_path):
    ward = Ward(ward_config(), tmp_path, {"south": 5}).run()
    ward.goes = {}
    for _ in range(3):  # however often it is started again
        ward.finished.discard("south")
        for _ in range(50):
            ward.turn("south")
        assert ward.told.pop("south").number == 608


# -- those who suffice, and those who are slow -----------------------------------------------------------


def test_without_its_quorum_the_run_waits_and_says_for_whom(tmp_path):
    ward = Ward(ward_config(order="fair"), tmp_path, {"south": 0, "east": 0})
    for number in range(400):
        ward.turn((SERVER, *ward.config.run.sites)[number % 4])
    assert ward.server.excluded == {}
    assert ward.store.statuses([SERVER])[SERVER].report.lacking == ("south", "east")
    ward.goes = {"south": 0}  # east comes, so two of three are there
    ward.run()
    assert list(ward.server.excluded) == ["south"]
    assert ward.store.statuses([SERVER])[SERVER].report.lacking == ()


@pytest.mark.parametrize("order", ["strict", "fair"])
def test_without_a_quorum_rule_nobody_is_left_out(order, tmp_path):
    ward = Ward(replace_run(ward_config(order=order), quorum=None), tmp_path, {"south": 3})
    for number in range(400):
        ward.turn((SERVER, *ward.config.run.sites)[number % 4])
    assert ward.server.excluded == {}
    assert SERVER not in ward.finished
    assert ward.store.statuses([SERVER])[SERVER].report.lacking == ("south",)


def slow_run(ward):
    """One site makes a step where the others make twenty; applied messages per site when the first others are done."""
    first_done = None
    for number in range(20_000):
        if ward.over:
            return first_done
        for name in (SERVER, "north", "east", *(["south"] if number % 20 == 0 else [])):
            ward.turn(name)
        applied, plans = ward.server.applied, ward.server.sequences
        if first_done is None and all(s in plans and applied[s] == plans[s].last for s in ("north", "east")):
            first_done = dict(applied)
    raise AssertionError(f"the run hangs: {ward.server.applied}")


def staleness(ward, site):
    return max(line.metrics["staleness"] for line in ward.lines if line.metrics.get("site") == site and
               line.metrics["event"] == "train")  # fmt: skip


def test_in_fair_order_a_slow_site_holds_nobody_back(tmp_path):
    config = ward_config(order="fair", absence_hours=2.0)
    ward = Ward(config, tmp_path)
    then = slow_run(ward)
    assert ward.server.excluded == {}, "slow is not silent"
    assert then["south"] < ward.server.sequences["south"].last / 2, "the others were done long before"
    assert ward.server.applied["south"] == ward.server.sequences["south"].last
    # A batch is used when at most a window of each other site came between.
    window, others = config.run.window, len(config.run.sites) - 1
    assert max(staleness(ward, "north"), staleness(ward, "east")) <= (others + 1) * (window + 1)


def test_in_strict_order_all_wait_for_a_slow_site_and_nothing_changes(tmp_path):
    config = ward_config(absence_hours=2.0)
    ward = Ward(config, tmp_path / "slow")
    then = slow_run(ward)
    assert ward.server.excluded == {}
    assert then["south"] >= ward.server.sequences["south"].last - 2, "they came to the end together"
    assert ward.outcome() == Ward(config, tmp_path / "calm").run().outcome()
