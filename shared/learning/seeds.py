"""Seeds derived from their purpose, so that a replay needs no saved generator state.

A seed is a public number, as run.seed, or 32 secret bytes of a site. With `manual_seed` torch uses 32 bits of a seed on
the CPU, so that a server could try all of them: a secret seed fills the whole state of the generator.
"""

import hashlib
import hmac
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch

Seed = int | bytes
"""Public number, or secret bytes."""
AnySeed = TypeVar("AnySeed", int, bytes, Seed)

_WORDS = 624
_WORDS_OFFSET = 24
"""Place of the words of the Mersenne Twister in `Generator.get_state`, each in 8 bytes; a test keeps it."""


def seed_for(run_seed: AnySeed, *purpose: str | int) -> AnySeed:
    """Return a seed that depends on `run_seed` and every part of `purpose`: a 63-bit number, or secret bytes."""
    if isinstance(run_seed, bytes):
        return hmac.digest(run_seed, "/".join(map(str, purpose)).encode(), "sha256")
    text = "/".join(str(part) for part in (run_seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator_at(seed: Seed) -> torch.Generator:
    """Return a new CPU generator at a seed."""
    generator = torch.Generator()
    _start(generator, seed)
    return generator


def _start(generator: torch.Generator, seed: Seed) -> None:
    if isinstance(seed, int):
        generator.manual_seed(seed)
        return
    generator.manual_seed(int.from_bytes(seed[:8], "big") >> 1)
    if generator.device.type == "cpu":
        state = generator.get_state()
        words = np.frombuffer(hashlib.shake_256(seed).digest(4 * _WORDS), dtype="<u4").astype("<u8")
        state.numpy()[_WORDS_OFFSET : _WORDS_OFFSET + 8 * _WORDS] = words.view(np.uint8)
        generator.set_state(state)


@contextmanager
def seeded(seed: Seed, device: torch.device | str = "cpu") -> Iterator[None]:
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
            _start(generator, seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
