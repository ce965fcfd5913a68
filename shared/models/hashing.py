"""Hash of named weights."""

import hashlib
from collections.abc import Mapping

import torch


def weights_sha256(weights: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of names and values; it differs if a single bit does."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        values = weights[name].detach().cpu().contiguous().reshape(-1)  # a scalar cannot be viewed as bytes
        digest.update(name.encode() + b"\0" + values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
