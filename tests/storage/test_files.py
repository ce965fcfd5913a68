"""Files are there whole or not at all, and their owner's alone, whatever the umask."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nightsplit.broker.embedded.broker import EmbeddedBroker
from nightsplit.console.output import write_output
from nightsplit.shared.errors import StateError
from nightsplit.shared.runtime.process import lock_folder
from nightsplit.shared.storage.checkpoint import Checkpoints, Snapshot
from nightsplit.shared.storage.files import make_private_folder, write_atomic, write_new
from nightsplit.shared.storage.sqlite import open_database, transaction
from nightsplit.shared.storage.tensors import as_safetensors
from tests.harness.embedded import UP, files, store
from tests.harness.modes import open_to_others


@pytest.fixture(params=[0o000, 0o022, 0o077], ids=["umask 000", "umask 022", "umask 077"], autouse=True)
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_file_is_its_owners_alone(tmp_path: Path) -> None:
    write_atomic(tmp_path / "bytes", b"content")
    write_atomic(tmp_path / "tensors", as_safetensors({"a": torch.arange(3)}))
    write_atomic(tmp_path / "shown", b"content", mode=0o644)
    assert [mode(tmp_path / name) for name in ("bytes", "tensors", "shown")] == [0o600, 0o600, 0o644]
    assert torch.equal(load_file(tmp_path / "tensors")["a"], torch.arange(3))
    assert len(list(tmp_path.iterdir())) == 3, "no draft is left"


def test_a_file_is_private_before_anything_is_in_it(tmp_path: Path) -> None:
    seen = list[int]()
    write_new(tmp_path / "file", lambda path: (seen.append(mode(path)), path.write_bytes(b"content")))
    assert seen == [0o600]


def test_a_replaced_file_becomes_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "predictions.csv"
    path.write_text("old")
    path.chmod(0o666)
    write_atomic(path, b"new")
    assert (path.read_bytes(), mode(path)) == (b"new", 0o600)


@pytest.mark.parametrize("stage", ["content", "rename"])
def test_a_write_that_fails_leaves_the_old_file_and_no_draft(tmp_path: Path, stage: str) -> None:
    path = tmp_path / "facts"

    def half(draft: Path) -> None:
        draft.write_bytes(b"hal")
        raise OSError(28, "No space left on device")

    if stage == "content":
        path.write_bytes(b"whole")
    else:
        path.mkdir()
    with pytest.raises(OSError, match=r"No space|directory"):
        write_atomic(path, half if stage == "content" else b"new")
    assert list(tmp_path.iterdir()) == [path]
    assert path.is_dir() or path.read_bytes() == b"whole"


def test_a_full_disk_is_an_error_of_the_disk_for_tensors_too(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=True)
    try:
        with pytest.raises(OSError, match="No space left on device"):
            write_atomic(disk / "large", as_safetensors({"a": torch.zeros(100_000)}))
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_an_open_folder_is_closed(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    folder.chmod(0o777)
    with lock_folder(folder):
        assert open_to_others(folder) == []


@pytest.mark.parametrize("why", ["sticky", "another's"])
def test_a_folder_that_is_not_ours_to_close_is_refused(
    tmp_path: Path, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o1777 if why == "sticky" else 0o777)
    if why == "another's":
        if os.geteuid() != 0:
            pytest.skip("giving a folder away needs root")
        os.chown(folder, 65534, 65534)
        tmp_path.chmod(0o755)
        for parent in tmp_path.parents[:3]:  # one more where tests run side by side
            if parent.stat().st_uid == os.getuid() and parent.name.startswith(("pytest-", "popen-")):
                parent.chmod(0o755)
        os.seteuid(65533)
    try:
        refused = r"E513 .*shared is shared with other users\."
        with pytest.raises(StateError, match=refused), lock_folder(folder):
            pass
        with pytest.raises(StateError, match=refused):
            EmbeddedBroker(folder).declare([UP])
    finally:
        os.seteuid(os.getuid())
    assert mode(folder) & 0o777 == 0o777, "it is as it was"


def test_a_database_and_what_sqlite_writes_beside_it(tmp_path: Path) -> None:
    rows = open_database(tmp_path / "run.sqlite", "CREATE TABLE IF NOT EXISTS t (a)")
    with transaction(rows):
        rows.execute("INSERT INTO t VALUES (1)")
    assert {path.name for path in tmp_path.iterdir()} == {"run.sqlite", "run.sqlite-wal", "run.sqlite-shm"}
    assert open_to_others(*tmp_path.iterdir()) == []
    rows.close()
    (tmp_path / "run.sqlite").chmod(0o644)
    open_database(tmp_path / "run.sqlite", "").close()
    assert mode(tmp_path / "run.sqlite") == 0o600


def test_the_embedded_broker(tmp_path: Path) -> None:
    broker = EmbeddedBroker(tmp_path / "broker")
    broker.declare([UP])
    store(broker, 8)
    assert files(tmp_path / "broker") > 0
    assert open_to_others(tmp_path / "broker") == []


def test_a_checkpoint(tmp_path: Path) -> None:
    make_private_folder(tmp_path / "state")
    Checkpoints(tmp_path / "state" / "checkpoints").write(0, 1, Snapshot({"a": torch.zeros(3)}, {}))
    assert open_to_others(tmp_path / "state") == []


def test_output_goes_through_what_is_no_file(tmp_path: Path) -> None:
    """As root, `--output /dev/null` must not put a file in its place."""
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "link").symlink_to("file")
    write_output(tmp_path / "link", b"scores")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"scores"
    write_output(Path("/dev/null"), b"scores")
    assert Path("/dev/null").is_char_device()
