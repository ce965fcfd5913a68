"""Seeds derived from their purpose, so that a replay needs no saved generator state."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seed_for(run_seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed that depends on `run_seed` and every part of `purpose`."""
    text = "/".join(str(part) for part in (run_seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Run the body with torch's generators (CPU, and `device`'s) at `seed`, then restore them."""
    # Not torch.manual_seed: it also queues a seed, with a stack trace, for every other kind of
    # device, which takes longer than a small layer.
    device = torch.device(device)
    generators = [torch.default_generator]
    if device.type == "cuda":
        current = torch.cuda.current_device()  # initializes CUDA's generators
        index = current if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
