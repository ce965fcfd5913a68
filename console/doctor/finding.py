"""What doctor finds, check by check."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        check: what was looked at.
        found: how it is.
        fix: what to do; None where nothing is to be done.
        failed: whether the worker cannot work like this.
    """

    check: str
    found: str
    fix: str | None = None
    failed: bool = False


def size(count: float) -> str:
    """'2.1 KiB', '16.0 MiB', '74.5 GiB'."""
    unit = min(3, max(1, (int(count).bit_length() - 1) // 10))
    return f"{count / 2 ** (10 * unit):.1f} {'KMG'[unit - 1]}iB"
