"""Who may read what a command wrote."""

from __future__ import annotations

import stat
from contextlib import suppress
from pathlib import Path


def open_to_others(*places: Path) -> list[str]:
    """Files and folders, these and all below, to which group or others have any right, each with its mode."""
    found = []
    for path in (path for place in places for path in (place, *place.rglob("*"))):
        with suppress(FileNotFoundError):  # a draft, or a log of SQLite, that was removed meanwhile
            mode = path.lstat().st_mode
            if mode & 0o077 and not stat.S_ISLNK(mode):
                found.append(f"{path} {stat.filemode(mode)}")
    return found
