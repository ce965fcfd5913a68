"""Seeded pieces of what messages hold, to look for on the disk of someone who may not read it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path


def seeded_patterns(contents: Sequence[bytes], count: int) -> list[bytes]:
    """Pieces of 12 bytes, none of them of a few values only."""
    draws, found = random.Random(7), []
    while len(found) < count:
        content = draws.choice(contents)
        start = draws.randrange(len(content) - 12)
        piece = content[start : start + 12]
        if len(set(piece)) >= 8:
            found.append(piece)
    return found


def tensors_in(body: bytes) -> bytes:
    """The part of an unsealed message behind its head."""
    return body[4 + int.from_bytes(body[:4], "big") :]


def scalars_in(contents: Sequence[bytes], *names: bytes) -> list[bytes]:
    """Names of scalars with the bytes of their values."""
    found = [(content, name, content.find(name)) for content in contents for name in names]
    return [content[place : place + len(name) + 2] for content, name, place in found if place >= 0]


def hits(patterns: Sequence[bytes], folder: Path) -> int:
    """Number of patterns in any file of a folder."""
    text = b"".join(file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file())
    return sum(pattern in text for pattern in patterns)
