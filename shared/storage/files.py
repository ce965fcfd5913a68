"""Files that outlive a power cut, and are there whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

SECRET_BYTES = 32


def write_durably(path: Path, content: bytes) -> None:
    """Write a file, or replace one: a reader finds the old content or the new one.

    Raises:
        OSError: it cannot be written.
    """
    draft = path.with_name(f".{path.name}.draft")
    draft.write_bytes(content)
    force_to_disk(draft)
    draft.replace(path)


def force_to_disk(path: Path) -> None:
    """Return when a file's content, or a folder's list of files, would outlive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_secret_file(path: Path) -> bytes:
    """The secret in `path`.

    Raises:
        ValueError: others may read it, or it is no secret; says which.
        OSError: it cannot be read.
    """
    if path.stat().st_mode & 0o077:
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
    draft = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(secret)
            file.flush()
            os.fsync(file.fileno())
        os.link(draft, path)  # unlike a rename, it never replaces one that another process made meanwhile
    finally:
        draft.unlink()
    force_to_disk(path.parent)
    return secret
