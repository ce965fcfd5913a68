"""Checkpoints are whole or not there; a damaged one is passed over, never silently replaced by nothing."""

import os
import shutil
import subprocess

import pytest
import torch

from nightsplit.shared.errors import StateError
from nightsplit.shared.storage.checkpoint import MANIFEST, TENSORS, Checkpoints, Pointer, Snapshot


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


@pytest.mark.parametrize("kept", ["pointer", "no pointer"])
@pytest.mark.parametrize("name", [TENSORS, MANIFEST])
@pytest.mark.parametrize("how", ["flip", "truncate", "empty", "missing"])
def test_a_damaged_one_is_passed_over_and_named(checkpoints, name, how, kept):
    """A site keeps no pointer, and has to see it from the folder alone."""
    pointer = checkpoints.load()[0] if kept == "pointer" else None
    damage(checkpoints.folder / "000001-000000003" / name, how)
    found, restored, damaged = checkpoints.load(pointer)
    assert (found.counter, restored.facts["value"]) == (2, 2)
    (said,) = damaged
    what = {"missing": f"{name}: No such file"}.get(how, "the tensors" if name == TENSORS else "the manifest")
    assert said.startswith(f"000001-000000003: {what}")


def test_every_bit_of_a_manifest_counts(checkpoints):
    """Also one that leaves it well-formed: 'value' 3 must not come back as 2."""
    manifest = checkpoints.folder / "000001-000000003" / MANIFEST
    whole = manifest.read_bytes()
    for bit in range(8 * len(whole)):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        manifest.write_bytes(content)
        found, restored, damaged = checkpoints.load()
        assert (found.counter, restored.facts["value"]) == (2, 2), content
        assert damaged in ([f"000001-000000003: the {part} damaged"] for part in ("manifest is", "tensors are"))


@pytest.mark.parametrize("content", ["[]", "3", "null", '"text"', "{}", '{"facts": {}}'])
def test_a_manifest_that_is_something_else(checkpoints, content):
    (checkpoints.folder / "000001-000000003" / MANIFEST).write_text(content)
    assert checkpoints.load()[2] == ["000001-000000003: the manifest is damaged"]


def test_a_place_that_is_a_file(checkpoints):
    shutil.rmtree(checkpoints.folder / "000001-000000003")
    (checkpoints.folder / "000001-000000003").write_text("")
    found, _, damaged = checkpoints.load()
    assert found.counter == 2
    assert damaged == ["000001-000000003: manifest.json: Not a directory"]


def test_the_newest_that_counts_is_gone(checkpoints):
    """The pointer was moved, and the folder is missing: as bad as damage, and told."""
    pointer = checkpoints.load()[0]
    shutil.rmtree(checkpoints.folder / "000001-000000003")
    found, _, damaged = checkpoints.load(pointer)
    assert (found.counter, damaged) == (2, ["000001-000000003: is missing"])


def test_another_one_in_the_place_of_the_newest(checkpoints, tmp_path):
    pointer = checkpoints.load()[0]
    Checkpoints(tmp_path / "elsewhere").write(1, 3, snapshot(7))
    shutil.rmtree(checkpoints.folder / "000001-000000003")
    shutil.copytree(tmp_path / "elsewhere" / "000001-000000003", checkpoints.folder / "000001-000000003")
    found, _, damaged = checkpoints.load(pointer)
    assert (found.counter, damaged) == (2, ["000001-000000003: not the one that the run store names"])


@pytest.mark.parametrize("fence", [1, 2], ids=["site", "server"])
def test_a_damaged_one_takes_no_place_of_a_sound_one(checkpoints, fence):
    """After falling back there have to be two again that can be trusted; a server goes on under its next fence."""
    damage(checkpoints.folder / "000001-000000003" / TENSORS, "flip")
    assert checkpoints.load()[0].counter == 2
    checkpoints.write(fence, 3, snapshot(33))
    checkpoints.prune()
    assert places(checkpoints) == ["000001-000000002", f"{fence:06d}-000000003"]
    assert checkpoints.load()[1].facts == {"value": 33}
    checkpoints.write(fence, 4, snapshot(4))
    checkpoints.prune()
    assert places(checkpoints) == [f"{fence:06d}-000000003", f"{fence:06d}-000000004"]


def test_with_none_left_there_is_no_silent_start_from_zero(checkpoints):
    for place in places(checkpoints):
        damage(checkpoints.folder / place / TENSORS, "flip")
    with pytest.raises(StateError) as caught:
        checkpoints.load()
    assert caught.value.number == 502
    assert "000001-000000003: the tensors are damaged; 000001-000000002: the tensors are damaged" in str(caught.value)


@pytest.mark.parametrize("left", ["an empty folder", "no folder"])
def test_a_folder_that_lost_everything_is_no_fresh_start(checkpoints, left):
    pointer = checkpoints.load()[0]
    shutil.rmtree(checkpoints.folder)
    if left == "an empty folder":
        checkpoints.folder.mkdir()
    with pytest.raises(StateError, match=r"E502 .*000001-000000003: is missing"):
        checkpoints.load(pointer)


def test_a_pointer_without_its_checkpoint_is_an_error(tmp_path):
    with pytest.raises(StateError) as caught:
        Checkpoints(tmp_path).load(Pointer(1, 3, "0" * 64))
    assert caught.value.number == 502


def test_a_draft_left_by_a_crash_is_ignored(checkpoints):
    draft = checkpoints.folder / ".000001-000000004.draft"
    shutil.copytree(checkpoints.folder / "000001-000000003", draft)
    (draft / MANIFEST).unlink()
    assert checkpoints.load()[0].counter == 3
    checkpoints.write(1, 4, snapshot(4))
    assert checkpoints.load()[0].counter == 4
    assert not draft.exists()


def test_what_somebody_put_beside_them_is_ignored(checkpoints):
    for name in ("lost+found", "000001-000000003.bak", "backup"):
        shutil.copytree(checkpoints.folder / "000001-000000002", checkpoints.folder / name)
    (checkpoints.folder / "notes.txt").write_text("do not touch")
    assert checkpoints.load()[0].counter == 3
    checkpoints.write(1, 4, snapshot(4))
    checkpoints.prune()
    assert checkpoints.load()[0].counter == 4
    assert (checkpoints.folder / "backup").is_dir()


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
