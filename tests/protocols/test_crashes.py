"""Workers are thrown away between any two steps of the loop; the result must not change.

This is the cheap, exhaustive cousin of the SIGKILL tests in tests/runs: no process dies, but every
in-memory state does, many times per run, on seeded schedules.
"""

import shutil

import pytest

from nightsplit.shared.errors import RunError
from nightsplit.shared.wire.message import SERVER
from tests.harness.night import Night, each_system, tiny_config

SEEDS = [0, 1, *(pytest.param(seed, marks=pytest.mark.campaign) for seed in (2, 3))]


@pytest.mark.parametrize("seed", SEEDS)
@each_system
def test_a_strict_run_ends_bit_identical(system, seed, calm, tmp_path):
    config = tiny_config(**system._asdict(), average_every=3, epochs=2)
    assert Night(config, tmp_path, prefetch=16).shaken(seed).fingerprint() == calm(config).fingerprint()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("protocol", ["split_labels", "split_u", "fedavg_transfer", "fedavg_dp_seg", "data_vectors"])
def test_a_fair_run_ends_like_the_replay_of_its_journal(protocol, seed, tmp_path):
    config = tiny_config(protocol=protocol, order="fair", window=3, epochs=2)
    night = Night(config, tmp_path / "shaken", prefetch=16).shaken(seed)
    assert night.replayed(tmp_path / "replay").fingerprint() == night.fingerprint()


def test_the_schedule_shows_in_a_fair_run(tmp_path):
    """Otherwise the test above could not fail."""
    config = tiny_config(order="fair", window=3, epochs=2)
    nights = [Night(config, tmp_path / str(seed), prefetch=16).shaken(seed) for seed in range(4)]
    assert len({night.fingerprint() for night in nights}) > 1


def test_a_lost_disk_is_noticed_at_hello(tmp_path):
    """Answers that the site has announced as saved are kept nowhere: it is told, and does not wait for ever."""
    night = Night(tiny_config(window=1, epochs=12), tmp_path, prefetch=8, on_disk=True)
    for name in night.workers:
        night.start(name)
    while not night.server._released["north"]:
        for engine in night.engines.values():
            engine.step(0.0)
    night.kill("north")
    shutil.rmtree(tmp_path / "north")
    night.start("north")

    def go_on():
        for _ in range(200):
            for engine in night.engines.values():
                engine.step(0.0)

    with pytest.raises(RunError) as caught:
        go_on()
    assert caught.value.number == 504


@pytest.mark.parametrize("worker", [SERVER, "north"])
def test_another_run_toml_is_refused_before_anything_is_sent(worker, tmp_path):
    night = Night(tiny_config(), tmp_path)
    night.work(SERVER)
    night.work("north")
    night.work(SERVER)
    night.config = tiny_config(window=5)
    with pytest.raises(RunError) as caught:
        night.start(worker)
    assert caught.value.number == 601
