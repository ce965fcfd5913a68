"""A disk that forgets: after a power cut, what was not forced to it is gone.

    folder.img ──loop device, ext4──▶ folder
    cut()   shuts the file system down without a flush of its journal ─▶ mounts a copy, which replays that journal

The shutdown is the one with which ext4 itself is tested: from this moment on nothing reaches the image, and what is
found afterwards is what a host would find. The mount options take away what ext4 does for programs that do not sync:
no commit every five seconds, no flush before a rename, no order of data and journal. Erlang relies on the second.

Root and the programs of Debian's base system (mount, e2fsprogs) are needed. The fixture `power_cuts` skips tests where
such a disk cannot be made.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import random
import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

SHUTDOWN, WITHOUT_FLUSH = 0x8004587D, 2
"""EXT4_IOC_SHUTDOWN, and its EXT4_GOING_FLAGS_NOLOGFLUSH."""
FORGETFUL = "loop,commit=3600,noauto_da_alloc,data=writeback"
USUAL = "loop"
"""Options of the mount: all that may be forgotten is, or what a host forgets that has its file system as it comes."""
IMAGE_BYTES = 256 * 2**20
"""Size of an image, of which only what is written takes space: a broker keeps 64 MiB free."""


class ForgetfulDisk:
    """A disk at `folder`, with what is in it, until it is closed.

    Args:
        folder: where it is mounted.
        options: `FORGETFUL` or `USUAL`.
    """

    def __init__(self, folder: Path, options: str = FORGETFUL) -> None:
        self.folder = folder
        self._options = options
        self._image = folder.with_name(f"{folder.name}.img")
        before = folder.with_name(f"{folder.name}.before")
        if folder.exists():
            folder.rename(before)
        folder.mkdir(parents=True)
        with self._image.open("wb") as image:
            image.truncate(IMAGE_BYTES)
        _run("mkfs.ext4", "-q", "-F", "-m", "0", self._image)
        self._mount()
        (folder / "lost+found").rmdir()
        if before.exists():
            shutil.copytree(before, folder, dirs_exist_ok=True)
        self.sync()
        atexit.register(self.close)

    def sync(self) -> None:
        """Force everything to it, as a host does sooner or later."""
        _run("sync", "--file-system", self.folder)

    def cut(self) -> None:
        """Cut the power, and bring it back; processes that use this disk must be dead."""
        root = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.ioctl(root, SHUTDOWN, struct.pack("I", WITHOUT_FLUSH))
        finally:
            os.close(root)
        # Lazily, and mounted again from a copy: a killed process or a container that was started meanwhile may hold
        # the old mount, to which nothing can be written any more.
        _run("umount", "--lazy", self.folder)
        copy = self._image.with_suffix(".copy")
        _run("cp", "--sparse=always", self._image, copy)
        copy.replace(self._image)
        self._mount()

    def close(self) -> None:
        """Take the disk away, with all that is on it."""
        if self.folder.is_mount():
            _run("umount", "--lazy", self.folder)
        self._image.unlink(missing_ok=True)
        atexit.unregister(self.close)

    def _mount(self) -> None:
        _run("mount", "-o", self._options, self._image, self.folder)
        self.folder.chmod(0o700)


class Host:
    """Several disks of one host, whose power is cut by `kill`.

    At each cut, chance says which of them forget: writes that nobody waited for may have reached a disk or not.
    """

    def __init__(self, folders: Sequence[Path], seed: int) -> None:
        self.disks = [ForgetfulDisk(folder) for folder in folders]
        self._dice = random.Random(seed)

    def kill(self) -> None:
        """Cut the power; the host's processes are dead already."""
        for disk in self._dice.sample(self.disks, self._dice.randint(1, len(self.disks))):
            disk.cut()

    def start(self) -> None:
        """Do nothing: the disks are there again."""

    def close(self) -> None:
        """Take all disks away."""
        for disk in self.disks:
            disk.close()


def _run(*command: str | Path) -> None:
    done = subprocess.run([*map(os.fspath, command)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr}")
