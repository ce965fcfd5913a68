"""Files that outlive a power cut, are there whole or not at all, and are their owner's alone."""

import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path

from nightsplit.shared.errors import StateError

SECRET_BYTES = 32

Content = bytes | Callable[[Path], object]
"""What goes into a file, or a function that writes it to the path it is given: large things need no copy in memory."""

_OTHERS = 0o077
"""All rights of group and others."""


def write_atomic(path: Path, content: Content, mode: int = 0o600) -> None:
    """Write a file, or replace one: whoever reads it finds the old content or the new one, also after a power cut.

    A process that is killed meanwhile leaves a draft, `.NAME.XXXXXXXX.draft`, which nobody reads.

    Args:
        path: the file; its folder is there.
        content: what it shall hold.
        mode: its permissions, whatever the umask.

    Raises:
        OSError: it cannot be written; the old content stays.
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
    """Write a file that is not there yet, and force it to disk; its name is durable once the folder is, too.

    Arguments as of `write_atomic`.

    Raises:
        OSError: it is there, or cannot be written; then nothing of it stays.
    """
    path.touch(0o600, exist_ok=False)  # before there is anything in it
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
    """Return when a file's content, or a folder's list of files, would outlive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_private_folder(path: Path) -> None:
    """Make a folder that its owner alone may enter, whatever the umask; one that is there is kept private.

    Raises:
        OSError: it cannot be made.
        StateError: 513 as `keep_private`.
    """
    path.mkdir(0o700, parents=True, exist_ok=True)
    keep_private(path)


def keep_private(path: Path) -> None:
    """Take away what rights group and others have to a file or folder of ours.

    Raises:
        StateError: 513 it is another user's, or a folder of all users (such as /tmp).
    """
    mode = path.stat().st_mode
    if not mode & _OTHERS:
        return
    try:
        if mode & stat.S_ISVTX:
            raise PermissionError
        path.chmod(stat.S_IMODE(mode) & ~_OTHERS)
    except PermissionError:
        remedy = "name a place of your own, or a folder below it, which is made for you alone."
        raise StateError(513, f"{path} is shared with other users.", remedy) from None


def read_secret_file(path: Path) -> bytes:
    """The secret in `path`; OSError: it cannot be read, ValueError: says that others may read it, or why it is none."""
    if path.stat().st_mode & _OTHERS:
        raise ValueError("may be read by other users")
    secret = path.read_bytes()
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"has {len(secret)} bytes in place of {SECRET_BYTES}")
    return secret


def make_secret_file(path: Path) -> bytes:
    """A new secret, durable in `path` with mode 0600: whole, or not at all.

    Raises:
        FileExistsError: there is one.
        OSError: it cannot be written.
    """
    secret = secrets.token_bytes(SECRET_BYTES)
    draft = _draft_of(path)
    write_new(draft, secret)
    try:
        os.link(draft, path)  # unlike a rename, it never replaces one that another process made meanwhile
    finally:
        draft.unlink()
    force_to_disk(path.parent)
    return secret


def _draft_of(path: Path) -> Path:
    """A name beside `path` that no other writer has."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.draft")
