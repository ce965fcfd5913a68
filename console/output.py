"""The result of a verb: printed, or in a file for the user alone."""

import sys
from pathlib import Path

from nightsplit.shared.storage.files import write_atomic


def write_output(path: Path | None, content: bytes) -> None:
    """Write `content` to `path`, making its folder; or print it, where `path` is None.

    Raises:
        OSError: it cannot be written.
    """
    if path is None:
        sys.stdout.write(content.decode())
    elif path.is_symlink() or (path.exists() and not path.is_file()):
        path.write_bytes(content)  # /dev/stdout, a pipe: what is behind it is not ours to replace
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
