"""Hippocampus volumes as sequences whose areas add up to a volume, and an encoder that has seen the experts' masks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import adaptive_avg_pool1d, binary_cross_entropy_with_logits, pad

from benchmarks.accuracy.sequences_material import TEST, Material
from nightsplit.shared.config.run import DataSection, TaskSection
from nightsplit.shared.models.segmentation import unet
from nightsplit.site_worker.config import SourceSection
from nightsplit.site_worker.data.augment import augment
from nightsplit.site_worker.data.dataset import Dataset
from nightsplit.site_worker.data.source import load_dataset
from nightsplit.site_worker.data.split import shuffled

FRAMES, SIDE, PITCH = 12, 48, 2
"""Slices of a volume, around its middle; mm of a frame's side, one pixel each; mm from frame to frame."""
PLACES = (-1, 0, 1)
"""mm that the training sequences of a volume are moved by. The test's are not."""
SCHEDULE = PASSES, RATE, DECAY, BATCH = 16, 1e-2, 1e-2, 64
"""Pretraining: AdamW with a learning rate that falls to zero as a cosine; the gradient's norm is clipped to 1."""


@dataclass(frozen=True, eq=False)
class Volume:
    """A scan of 1 mm a voxel.

    Attributes:
        slices, masks: float32 (n, SIDE, SIDE), the middle of the archive's; intensities from 0 to 1.
        extents: of what was scanned, within a slice, in mm.
        size: of the hippocampus by the expert's mask, in mm^3.
    """

    slices: torch.Tensor
    masks: torch.Tensor
    extents: tuple[int, int]
    size: float

    def frames(self, place: int = 0) -> torch.Tensor:
        """(FRAMES, SIDE, SIDE); nothing (0) beyond the scan."""
        return self._taken(self.slices, place)

    @property
    def area(self) -> float:
        """Area of the hippocampus in all frames, by the expert's mask."""
        return self._taken(self.masks, 0).sum().item()

    @property
    def simple(self) -> list[float]:
        """Mean intensity, number of slices and extents, from which a label should not follow."""
        return [self.slices.mean().item(), len(self.slices), *self.extents, len(self.slices) * math.prod(self.extents)]

    @staticmethod
    def _taken(slices: torch.Tensor, place: int) -> torch.Tensor:
        extent = FRAMES * PITCH
        first = (len(slices) - 1) // 2 + place - (FRAMES - 1) * PITCH // 2
        return pad(slices, (0, 0, 0, 0, extent, extent))[extent + first :: PITCH][:FRAMES]


@dataclass(frozen=True, eq=False)
class Division:
    """Volumes of training and test patients, scaled by the mean and spread of the former."""

    train: dict[str, Volume]
    test: dict[str, Volume]
    mean: float
    spread: float

    def scaled(self, images: torch.Tensor) -> torch.Tensor:
        """Images as networks see them, of the same shape."""
        return (images - self.mean) / self.spread


def hippocampus(seed: int) -> Material:
    """Frames, and whether the volume is larger than the median of the training volumes.

    Raises:
        NightsplitError: the data set is not here.
    """
    known = division(seed)
    median = float(np.median([volume.size for volume in known.train.values()]))

    def sequences(volumes: dict[str, Volume], places: tuple[int, ...]) -> Dataset:
        rows = [(volume, name, place) for name, volume in volumes.items() for place in places]
        large = torch.tensor([float(volume.size > median) for volume, _, _ in rows])
        inputs = known.scaled(torch.stack([volume.frames(place) for volume, _, place in rows]))
        return Dataset(inputs, large, tuple(name for _, name, _ in rows))

    def simple(features: Callable[[Volume], list[float]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        many, few = (np.array([*map(features, of.values())]) for of in (known.train, known.test))
        return many, few

    return Material(
        sequences(known.train, PLACES),
        sequences(known.test, (0,)),
        {
            "mean intensity, number of slices": simple(lambda volume: volume.simple[:2]),
            "the same and the extents of the scan": simple(lambda volume: volume.simple),
            f"area in the {FRAMES} frames by the expert's mask": simple(lambda volume: [volume.area]),
        },
    )


class AreaEncoder(nn.Module):
    """Return the share of foreground in a frame and in each strip of it; each frame by itself.

    A U-Net gives every pixel a probability. Its mean p over all rows, over each half and each quarter of them becomes a
    feature tanh((p - mean) / (3 spread)): for most p, an area up to a constant. The network can learn alone before,
    from masks.

    Shapes: float32 (batch, frames, height, width) -> (batch, frames, FEATURES), all within [-1, 1]; height and width
    are multiples of 8.

    Args:
        width: channels of the U-Net's first level, a multiple of 4.
    """

    STRIPS = (1, 2, 4)
    FEATURES = sum(STRIPS)

    mean: torch.Tensor
    spread: torch.Tensor

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.network = unet(width=width)
        self.register_buffer("mean", torch.zeros(self.FEATURES))
        self.register_buffer("spread", torch.full((self.FEATURES,), 0.1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the features, as the class says."""
        return torch.tanh((self.shares(images) - self.mean) / (3 * self.spread))

    def shares(self, images: torch.Tensor) -> torch.Tensor:
        """p: of the frames, and of their strips; shapes as those of the features."""
        rows = torch.sigmoid(self.network(images.flatten(0, 1).unsqueeze(1))).mean(3).squeeze(1)
        shares = torch.cat([adaptive_avg_pool1d(rows, strips) for strips in self.STRIPS], 1)
        return shares.view(*images.shape[:2], -1)


def pretrained(seed: int, quick: bool) -> AreaEncoder:
    """An encoder whose network has learned to find the hippocampus in all slices of the training volumes."""
    known = division(seed)
    images, masks = (
        torch.cat([getattr(volume, part) for volume in known.train.values()]).unsqueeze(1)
        for part in ("slices", "masks")
    )
    torch.manual_seed(seed)
    encoder = AreaEncoder()
    optimizer = torch.optim.AdamW(encoder.parameters(), RATE, weight_decay=DECAY)
    passes = 1 if quick else PASSES
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, passes * math.ceil(len(images) / BATCH))
    chance = torch.Generator().manual_seed(seed)
    for _ in range(passes):
        for rows in torch.split(torch.randperm(len(images), generator=chance), BATCH):
            # Image and mask move as one.
            moved = augment(torch.cat([images[rows], masks[rows]], 1), ("rotate", "zoom"), chance)
            image, mask = moved.split(1, 1)
            logits = encoder.network(known.scaled(augment(image, ("contrast",), chance)))
            p = torch.sigmoid(logits)
            dice = (2 * (p * mask).sum() + 1) / (p.sum() + mask.sum() + 1)
            optimizer.zero_grad()
            torch.autograd.backward(binary_cross_entropy_with_logits(logits, mask) + 1 - dice)
            nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
            optimizer.step()
            falling.step()
    frames = hippocampus(seed).train.inputs
    with torch.no_grad():
        shares = torch.cat([encoder.shares(some) for some in frames.split(64)])
        encoder.mean.copy_(shares.mean((0, 1)))
        encoder.spread.copy_(shares.std((0, 1)))
    return encoder.eval()


@lru_cache(maxsize=3)
def division(seed: int) -> Division:
    """Divide all volumes by patient."""
    volumes = _volumes()
    names = shuffled(volumes, seed)
    first = round(TEST * len(names))
    test, train = ({name: volumes[name] for name in of} for of in (names[:first], names[first:]))
    spread, mean = torch.std_mean(torch.cat([volume.slices for volume in train.values()]))
    return Division(train, test, mean.item(), spread.item())


def _volumes() -> dict[str, Volume]:
    source = SourceSection(
        source="arrays", path="$NIGHTSPLIT_DATA/hippocampus_msd/hippocampus_2d.npz", masks="masks", patient="volume"
    )
    whole = load_dataset(source, DataSection(image_size=64), TaskSection(kind="segmentation"), Path())
    patients = np.array(whole.patients)
    inside = slice((64 - SIDE) // 2, (64 + SIDE) // 2)
    volumes = {}
    for name in dict.fromkeys(whole.patients):
        rows = torch.from_numpy(np.flatnonzero(patients == name))
        slices, masks = whole.inputs[rows].squeeze(1), whole.targets[rows]
        seen = slices.amax(0) > 0
        volumes[name] = Volume(
            slices[:, inside, inside],
            masks[:, inside, inside],
            (int(seen.any(1).sum()), int(seen.any(0).sum())),
            masks.sum().item(),
        )
    return volumes
