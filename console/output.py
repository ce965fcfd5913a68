"""Output of a verb: printed, or a file that only the user can read."""

import sys
from pathlib import Path

from nightsplit.shared.storage.files import write_atomic


def write_output(path: Path | None, content: bytes) -> None:
    """Write `content` to `path` and make its folder; print it if `path` is None. OSError if it cannot be written."""
    if path is None:
        sys.stdout.write(content.decode())
    elif path.is_symlink() or (path.exists() and not path.is_file()):
        path.write_bytes(content)  # /dev/stdout or a pipe must not be replaced by a file
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
