"""Sequences with labels that no weighted sum of their features can tell."""

import torch


def xor_of_events(n: int, frames: int, features: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two events, each up or down in a frame of its own, in features 0 and 1; the label is whether they differ.

    Returns:
        float32 (n, frames, features) within [-1, 1], and labels of 0 and 1, float32 (n,).
    """
    generator = torch.Generator().manual_seed(seed)
    sequences = (0.1 * torch.randn(n, frames, features, generator=generator)).clamp(-1, 1)
    signs = torch.randint(0, 2, (n, 2), generator=generator)
    when = torch.rand(n, frames, generator=generator).argsort(1)[:, :2]
    for event in range(2):
        sequences[torch.arange(n), when[:, event], event] = 0.9 * (2.0 * signs[:, event] - 1)
    return sequences, (signs[:, 0] != signs[:, 1]).float()
