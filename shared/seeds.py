"""Seeds derived from what they are for, so that a replay needs no saved generator state."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seed_for(run_seed: int, *purpose: str | int) -> int:
    """A 63-bit seed that depends on `run_seed` and every part of `purpose`."""
    text = "/".join(str(part) for part in (run_seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Run the body with torch's generators (CPU, and `device`'s) at `seed`, then restore them."""
    device = torch.device(device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
