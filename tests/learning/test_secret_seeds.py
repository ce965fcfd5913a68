"""Seeds from a site's secret: all bits count, on the CPU too, and public seeds stay as they were."""

from __future__ import annotations

import torch

from nightsplit.shared.learning.seeds import generator_at, seed_for, seeded

SECRET = bytes(range(32))


def draws(seed, count=1000):
    return torch.randint(2**31, (count,), generator=generator_at(seed))


def test_a_public_seed_is_torchs_own():
    assert torch.equal(draws(7), torch.randint(2**31, (1000,), generator=torch.Generator().manual_seed(7)))


def test_the_same_secret_draws_the_same():
    assert torch.equal(draws(SECRET), draws(SECRET))
    with seeded(SECRET):
        first = torch.rand(10)
    with seeded(SECRET):
        assert torch.equal(torch.rand(10), first)
    assert torch.equal(first, torch.rand(10, generator=generator_at(SECRET)))


def test_every_bit_of_a_secret_counts():
    """`manual_seed` alone uses 32 bits: two secrets that agree in these would draw the same."""
    seen = {tuple(draws(SECRET, 4).tolist())}
    for bit in range(256):
        other = bytearray(SECRET)
        other[bit // 8] ^= 1 << bit % 8
        seen.add(tuple(draws(bytes(other), 4).tolist()))
    assert len(seen) == 257


def test_the_whole_state_is_filled():
    """The first 1,248 draws of 32 bits use every word of the state twice."""
    words = draws(SECRET, 1248)
    assert len(set(words.tolist())) > 1240
    bits = ((words.unsqueeze(1) >> torch.arange(31)) & 1).float().mean(0)
    assert ((bits - 0.5).abs() < 0.08).all()


def test_a_purpose_gives_another_secret():
    order, dropout = seed_for(SECRET, "order", "north", 1), seed_for(SECRET, "dropout", "north", 1)
    assert isinstance(order, bytes)
    assert len(order) == 32
    assert order != dropout
    assert order != seed_for(bytes(32), "order", "north", 1)
    assert isinstance(seed_for(3, "order"), int)
