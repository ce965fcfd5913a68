"""Findings of nightsplit doctor."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """Result of a check.

    Attributes:
        check: name of the check.
        found: the result in words.
        fix: what to do; None if nothing has to be done.
        failed: the worker cannot work like this.
    """

    check: str
    found: str
    fix: str | None = None
    failed: bool = False


def size(count: float) -> str:
    """Return '2.1 KiB', '16.0 MiB', '74.5 GiB'."""
    unit = min(3, max(1, (int(count).bit_length() - 1) // 10))
    return f"{count / 2 ** (10 * unit):.1f} {'KMG'[unit - 1]}iB"
