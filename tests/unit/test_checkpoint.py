"""Checkpoints are whole or not there; a damaged one is passed over, never silently replaced by nothing."""

import os
import subprocess

import pytest
import torch

from shared.checkpoint import MANIFEST, TENSORS, Checkpoints, Snapshot
from shared.errors import StateError
from shared.store import Pointer


def snapshot(value):
    return Snapshot({"weights": torch.full((4, 4), float(value))}, {"value": value})


@pytest.fixture
def checkpoints(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for counter in (1, 2, 3):
        checkpoints.write(1, counter, snapshot(counter))
        checkpoints.prune()
    return checkpoints


def places(checkpoints):
    return sorted(place.name for place in checkpoints.folder.iterdir())


def test_the_newest_two_stay(checkpoints):
    assert places(checkpoints) == ["000001-000000002", "000001-000000003"]
    pointer, found, damaged = checkpoints.load()
    assert (pointer.counter, found.facts, damaged) == (3, {"value": 3}, [])
    assert torch.equal(found.tensors["weights"], torch.full((4, 4), 3.0))


def test_a_higher_fence_is_newer_than_a_higher_counter(checkpoints):
    checkpoints.write(2, 1, snapshot(9))
    assert checkpoints.load()[0].fence == 2


def damage(path, how):
    if how == "flip":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif how == "truncate":
        os.truncate(path, path.stat().st_size // 2)
    elif how == "empty":
        os.truncate(path, 0)
    else:
        path.unlink()


@pytest.mark.parametrize("name", [TENSORS, MANIFEST])
@pytest.mark.parametrize("how", ["flip", "truncate", "empty", "missing"])
def test_a_damaged_one_is_passed_over_and_named(checkpoints, name, how):
    pointer = checkpoints.load()[0]
    damage(checkpoints.folder / "000001-000000003" / name, how)
    found, restored, damaged = checkpoints.load(pointer)
    assert (found.counter, restored.facts["value"]) == (2, 2)
    assert damaged[0].startswith("000001-000000003")


def test_with_none_left_there_is_no_silent_start_from_zero(checkpoints):
    for place in places(checkpoints):
        damage(checkpoints.folder / place / TENSORS, "flip")
    with pytest.raises(StateError) as caught:
        checkpoints.load()
    assert caught.value.number == 502


def test_a_pointer_without_its_checkpoint_is_an_error(tmp_path):
    with pytest.raises(StateError) as caught:
        Checkpoints(tmp_path).load(Pointer(1, 3, "0" * 64))
    assert caught.value.number == 502


def test_nothing_written_is_a_fresh_start(tmp_path):
    assert Checkpoints(tmp_path / "nowhere").load() is None


def test_what_the_pointer_does_not_name_does_not_count(checkpoints):
    pointer = checkpoints.load()[0]
    checkpoints.write(1, 4, snapshot(4))  # written, and the crash came before its pointer was moved
    assert checkpoints.load(pointer)[0].counter == 3


def test_a_draft_left_by_a_crash_is_ignored(checkpoints):
    (checkpoints.folder / ".000001-000000004.draft").mkdir()
    assert checkpoints.load()[0].counter == 3
    checkpoints.write(1, 4, snapshot(4))
    assert checkpoints.load()[0].counter == 4


def test_a_full_disk_keeps_the_last_one(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], check=True)
    try:
        checkpoints = Checkpoints(disk / "checkpoints")
        checkpoints.write(0, 1, snapshot(1))
        with pytest.raises(StateError) as caught:
            checkpoints.write(0, 2, Snapshot({"weights": torch.zeros(400, 400)}, {}))
        assert caught.value.number == 501
        assert "0.6 MiB" in str(caught.value)
        assert checkpoints.load()[0].counter == 1
        checkpoints.write(0, 2, snapshot(2))
        assert checkpoints.load()[0].counter == 2
    finally:
        subprocess.run(["umount", disk], check=True)
