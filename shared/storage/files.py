"""Durable, atomic files that only their owner can read."""

import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path

from nightsplit.shared.errors import StateError

SECRET_BYTES = 32

Content = bytes | Callable[[Path], object]
"""Bytes of a file, or a function that writes it to a path, which spares large content a copy in memory."""

_OTHERS_RIGHTS = 0o077
"""Permissions of group and others."""


def write_atomic(path: Path, content: Content, mode: int = 0o600) -> None:
    """Write or replace a file atomically: readers find the old content or the new one, also after a power cut.

    A process killed meanwhile leaves a draft, `.NAME.XXXXXXXX.draft`, which is never read; an OSError leaves the old
    content. `mode` holds regardless of the umask.
    """
    draft = _draft_of(path)
    write_new(draft, content, mode)
    try:
        draft.replace(path)
    except OSError:
        draft.unlink()
        raise
    force_to_disk(path.parent)


def write_new(path: Path, content: Content, mode: int = 0o600) -> None:
    """Create a file and force it to disk; its name is durable once the folder is forced to disk, too.

    OSError if it exists or cannot be written; then nothing of it stays.
    """
    path.touch(0o600, exist_ok=False)  # private before it has content
    try:
        if callable(content):
            content(path)
        else:
            path.write_bytes(content)
        path.chmod(mode)
        force_to_disk(path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def force_to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's list of files, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_private_folder(path: Path) -> None:
    """Create a folder that only its owner may enter, or make one so, regardless of the umask; StateError 513."""
    make_folder(path)
    keep_private(path)


def make_folder(path: Path) -> None:
    """Create a folder for its owner alone, and those above it that are missing; their names are durable."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(0o700, parents=True, exist_ok=True)
    for folder in missing:
        force_to_disk(folder.parent)


def rename_durably(path: Path, target: Path) -> None:
    """Rename within a folder, replacing `target`."""
    path.replace(target)
    force_to_disk(target.parent)


def keep_private(path: Path) -> None:
    """Remove all permissions of group and others; StateError 513 if it is another user's, or a folder of all (/tmp)."""
    mode = path.stat().st_mode
    if not mode & _OTHERS_RIGHTS:
        return
    try:
        if mode & stat.S_ISVTX:
            raise PermissionError
        path.chmod(stat.S_IMODE(mode) & ~_OTHERS_RIGHTS)
    except PermissionError:
        remedy = "name a folder of your own, or a new one inside it, which is created for you alone."
        raise StateError(513, f"{path} is shared with other users.", remedy) from None


def read_secret_file(path: Path) -> bytes:
    """Return the secret in `path`; OSError if it cannot be read, ValueError if it is invalid or others may read it."""
    if path.stat().st_mode & _OTHERS_RIGHTS:
        raise ValueError("may be read by other users")
    secret = path.read_bytes()
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"has {len(secret)} bytes instead of {SECRET_BYTES}")
    return secret


def make_secret_file(path: Path) -> bytes:
    """Create a secret in `path` with mode 0600, durably and atomically, and return it; FileExistsError, OSError."""
    secret = secrets.token_bytes(SECRET_BYTES)
    draft = _draft_of(path)
    write_new(draft, secret)
    try:
        os.link(draft, path)  # unlike a rename, never replaces one that another process created meanwhile
    finally:
        draft.unlink()
    force_to_disk(path.parent)
    return secret


def _draft_of(path: Path) -> Path:
    """Return a unique name beside `path`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.draft")
