"""Files that outlive a power cut, and are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


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
