"""The simulator itself: what it leaves out does not show."""

from nightsplit.shared.protocols.spec import TRAINING, systems
from nightsplit.shared.wire.message import SERVER
from tests.harness.night import SYSTEMS, Night, each_system, tiny_config


def test_every_system_is_here():
    assert {protocol for protocol, *_ in SYSTEMS} == set(systems(*TRAINING))


@each_system
def test_checkpoints_in_memory_and_on_disk_give_the_same_run(system, tmp_path):
    """In fair order, so that all that happens shows: which message was applied when, and what was trained."""
    config = tiny_config(**system._asdict(), average_every=3, epochs=2, order="fair")
    memory = Night(config, tmp_path / "memory", prefetch=16).shaken(seed=5)
    disk = Night(config, tmp_path / "disk", prefetch=16, on_disk=True).shaken(seed=5)
    assert (disk.journal(), disk.fingerprint()) == (memory.journal(), memory.fingerprint())
    assert all(checkpoints.load() is not None for checkpoints in disk.checkpoints.values())
    assert list((tmp_path / "disk" / SERVER / "checkpoints").iterdir())
    assert not list((tmp_path / "memory").rglob("manifest.json"))


def test_a_killed_worker_goes_on_where_its_checkpoint_was(tmp_path):
    night = Night(tiny_config(), tmp_path, prefetch=8)
    for worker in night.workers:
        night.start(worker)
    while night.server.applied["north"] < 9:
        for worker in list(night.engines):
            night.step(worker)
    applied = sum(night.server.applied.values())
    night.restart(SERVER)
    assert 0 < sum(night.server.applied.values()) <= applied
    assert night.run().finished == {*night.workers}
