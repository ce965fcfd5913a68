"""The hash by which people compare what two runs ended with."""

from __future__ import annotations

import torch
from torch import nn

from nightsplit.shared.models.hashing import weights_sha256


def test_it_sees_every_bit_and_every_name() -> None:
    torch.manual_seed(1)
    weights = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).state_dict()  # with a counter, which has no dimension
    same = weights_sha256(weights)
    assert weights_sha256({name: weights[name].clone() for name in reversed(weights)}) == same
    for name, tensor in weights.items():
        changed = tensor.clone()
        changed.view(-1).view(torch.uint8)[0] ^= 1
        assert weights_sha256({**weights, name: changed}) != same, name
    assert weights_sha256({f"0.{name}": tensor for name, tensor in weights.items()}) != same


def test_a_view_has_the_hash_of_its_values() -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    assert weights_sha256({"a": whole.T}) == weights_sha256({"a": whole.T.contiguous()})
