"""Workers are thrown away between any two steps of the loop; the result must not change.

This is the cheap, exhaustive cousin of the SIGKILL tests in tests/chaos: no process dies, but every
in-memory state does, many times per run, on seeded schedules.
"""

import random
import shutil

import pytest

from nightsplit.shared.errors import RunError
from nightsplit.shared.wire.message import SERVER
from tests.harness.night import Night, tiny_config


def shaken(night: Night, seed: int) -> str:
    """Run to the end while workers die at random; the fingerprint of what they ended with."""
    dice = random.Random(seed)
    names = [SERVER, *night.config.run.sites]
    finished: set[str] = set()
    for _ in range(20_000):
        name = dice.choice([name for name in names if name not in finished])
        if name not in night.engines:
            night.start(name).start()
        engine = night.engines[name]
        for _ in range(dice.randint(1, 12)):
            engine.step(0.0)
            if engine.finished:
                break
        if engine.finished:
            engine.leave()
            finished.add(name)
        if engine.finished or dice.random() < 0.15:
            night.kill(name)
        if len(finished) == len(names):
            return night.fingerprint()
    raise AssertionError(
        f"the run hangs: {[(n, r.applied if n == SERVER else r.answered) for n, r in night.roles.items()]}"
    )


SYSTEMS = [
    ("split_labels", "independent", 4),
    ("split_labels", "averaged", 1),
    ("split_labels", "averaged", 3),
    ("split_u", "independent", 1),
    ("split_u", "averaged", 2),
    ("split_frozen", "independent", 4),
    ("fedavg_transfer", "independent", 4),
    ("fedavg_dp_seg", "independent", 4),
    ("data_vectors", "independent", 4),
]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("protocol", "bottoms", "window"), SYSTEMS)
def test_a_strict_run_ends_bit_identical(protocol, bottoms, window, seed, tmp_path):
    config = tiny_config(protocol=protocol, bottoms=bottoms, average_every=3, window=window, epochs=2)
    calm = Night(config, tmp_path / "calm")
    calm.together()
    assert shaken(Night(config, tmp_path / "shaken", prefetch=16), seed) == calm.fingerprint()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("protocol", ["split_labels", "split_u", "fedavg_transfer", "fedavg_dp_seg", "data_vectors"])
def test_a_fair_run_ends_like_the_replay_of_its_journal(protocol, seed, tmp_path):
    config = tiny_config(protocol=protocol, order="fair", window=3, epochs=2)
    night = Night(config, tmp_path / "shaken", prefetch=16)
    fingerprint = shaken(night, seed)
    replay = Night(config, tmp_path / "replay")
    for position in range(1, 10_000):
        sender = night.store.journalled(position)
        if sender is None:
            break
        replay.store.journal(position, sender)
    replay.together()
    assert replay.fingerprint() == fingerprint


def test_the_schedule_shows_in_a_fair_run(tmp_path):
    """Otherwise the test above could not fail."""
    config = tiny_config(order="fair", window=3, epochs=2)
    assert len({shaken(Night(config, tmp_path / str(seed), prefetch=16), seed) for seed in range(4)}) > 1


def test_a_lost_disk_is_noticed_at_hello(tmp_path):
    """Answers that the broker has forgotten cannot come again: the site is told, and does not wait for ever."""
    night = Night(tiny_config(window=1), tmp_path, prefetch=8)
    for name in (SERVER, *night.config.run.sites):
        night.start(name).start()
    while night.roles["north"].answered < 8:
        for engine in night.engines.values():
            engine.step(0.0)
    night.kill("north")
    shutil.rmtree(tmp_path / "north")
    night.start("north").start()

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
