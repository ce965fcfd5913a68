"""The attack of Ziller et al. (arXiv 2107.02586): the image behind a site's update is recovered from it.

    python -m benchmarks.accuracy.inversion [--patients N] [--iterations N] [--folder FOLDER]

Hippocampus MRI slices of $NIGHTSPLIT_DATA. The site makes one step on one image, by its own trainers, with and
without differential privacy; the attacker (benchmarks/accuracy/inversion_attack.py) gets the update. One image is the
worst case that the privacy accounting speaks of: an attacker who knows all other records of a batch takes their
gradients away, and is left with this one and all of the noise.

Every figure stands beside the mean image of other patients, which the attacker has anyway: an attack that does
worse gained nothing. Writes inversion.json, inversion.md and inversion.png into the folder. Minutes per attack
on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from torch import nn

from benchmarks.accuracy.inversion_attack import Attacker, invert
from benchmarks.accuracy.similarity import psnr, ssim
from nightsplit.shared.config.optimizer import OptimizerSection
from nightsplit.shared.config.run import (
    DataSection,
    ModelSection,
    PrivacySection,
    RunConfig,
    RunSection,
    TaskSection,
)
from nightsplit.shared.learning.optimizers import START
from nightsplit.shared.models.segmentation import unet
from nightsplit.site_worker.privacy.accounting import noise_for
from nightsplit.site_worker.privacy.secret import Secret
from nightsplit.site_worker.privacy.trainer import PrivateTrainer
from nightsplit.site_worker.rounds.trainer import Trainer

PRIVACY = PrivacySection(epsilon=8.0, delta=1.9e-4, clip=0.2)
RECORDS, BATCH, STEPS = 2360, 128, 120
"""Size, batch and steps of a site's run at that epsilon, which decide how much noise there is."""
SMOOTHER = (1e-2, 1e-1)
"""Weights of total variation."""
HELD_BACK = 40
"""Volumes that are attacked or not used; the mean image is of the others."""
CONFIG = RunConfig(
    run=RunSection(id="inversion", protocol="fedavg_dp_seg", sites=["victim"]),
    model=ModelSection(factory="nightsplit.models:unet"),
    task=TaskSection(kind="segmentation"),
    optimizer=OptimizerSection(name="sgd", lr=0.1),
    data=DataSection(image_size=64),
)


class Victim(NamedTuple):
    """A patient's slice with the largest mask."""

    patient: int
    image: torch.Tensor
    mask: torch.Tensor
    box: tuple[slice, slice]

    @property
    def content(self) -> torch.Tensor:
        """Mask of the slice without padding, bool."""
        inside = torch.zeros_like(self.image, dtype=torch.bool)
        inside[self.box] = True
        return inside


@dataclass(frozen=True)
class Row:
    """An attack and its outcome; similarities are within the slice's content."""

    patient: int
    victim: str
    noise: str
    ssim: float
    psnr: float
    mean_ssim: float
    mean_psnr: float
    distance: float
    first_distance: float
    settled: bool
    matched: bool
    iterations: int
    seconds: float
    variation: float
    verdict: str = ""


# ── the site ────────────────────────────────────────────────────────────────────────────────────


def smooth() -> nn.Module:
    """The positive control: 29,937 weights, SiLU and average pooling, full resolution."""
    torch.manual_seed(0)
    return unet(fold=1, coordinates=False, smooth=True)


def folded() -> nn.Module:
    """The network of the example: 30,396 weights, ReLU and maximum pooling, folded pixels."""
    torch.manual_seed(0)
    return unet()


def update_of(module: nn.Module, victim: Victim, sigma: float | None) -> list[torch.Tensor]:
    """The gradient that an update reveals, by one step of the site's own trainer. `sigma` None: without DP."""
    trainer = (
        Trainer(module, CONFIG, "cpu")
        if sigma is None
        else PrivateTrainer(module, CONFIG, "cpu", PRIVACY, Secret(bytes(range(32))), sigma, 1.0)
    )
    before = [parameter.detach().clone() for parameter in module.parameters()]
    trainer.step(victim.image[None, None], victim.mask[None], victim.patient, START)
    return [(old - new.detach()) / CONFIG.optimizer.lr for old, new in zip(before, module.parameters(), strict=True)]


def hippocampus(patients: int) -> tuple[list[Victim], torch.Tensor]:
    """The first patients, and the mean image of those that are not held back."""
    archive = np.load(
        Path(os.environ["NIGHTSPLIT_DATA"]) / "hippocampus_msd" / "hippocampus_2d.npz", allow_pickle=False
    )
    images = torch.from_numpy(archive["images"]).float() / 255
    masks, volumes = torch.from_numpy(archive["masks"] > 0).float(), torch.from_numpy(archive["volume"])
    victims = []
    for patient in volumes.unique()[:patients].tolist():
        rows = torch.nonzero(volumes == patient)[:, 0]
        row = rows[masks[rows].sum((1, 2)).argmax()]
        filled = torch.nonzero(images[row])
        (top, left), (bottom, right) = filled.min(0).values.tolist(), filled.max(0).values.tolist()
        box = (slice(top, bottom + 1), slice(left, right + 1))
        victims.append(Victim(patient, images[row], masks[row], box))
    others = torch.isin(volumes, volumes.unique()[HELD_BACK:])
    return victims, images[others].mean(0)


# ── the attacks ─────────────────────────────────────────────────────────────────────────────────


def attacks(sigma: float, patients: int) -> Iterator[tuple[int, Callable[[], nn.Module], str, float | None]]:
    """Victim's number, network, words for the noise, and the noise: each patient, and then variations on the first."""
    for patient in range(patients):
        yield patient, smooth, "none", None
        yield patient, smooth, f"epsilon {PRIVACY.epsilon:g} (sigma {sigma:.2f})", sigma
    for little in (0.0, 0.001, 0.01):
        yield 0, smooth, f"clipped, sigma {little:g}", little
    yield 0, folded, "none", None


def attack(
    make: Callable[[], nn.Module], victim: Victim, mean: torch.Tensor, sigma: float | None, noise: str, iterations: int
) -> tuple[Row, torch.Tensor]:
    """An attack, how close it came, and its image.

    Against noise a smoother image may be the better guess: then the attacker has two tries, and is told which is
    the better one. It is enough that one of them settled.
    """
    update = update_of(make(), victim, sigma)
    truth, prior = victim.image[victim.box], mean[victim.box]
    tries = []
    for variation in SMOOTHER if sigma else SMOOTHER[:1]:
        began = time.monotonic()
        attacker = Attacker(iterations, variation=variation)
        found = invert(make(), update, victim.mask, mean, victim.content, attacker)
        guess = found.image[victim.box]
        row = Row(
            victim.patient, make.__name__, noise,
            ssim(guess, truth), psnr(guess, truth), ssim(prior, truth), psnr(prior, truth),
            found.distance, found.first_distance, found.settled, found.matched,
            iterations, time.monotonic() - began, variation,
        )  # fmt: skip
        tries.append((row, found.image))
    best, image = max(tries, key=lambda one: one[0].ssim)
    return replace(best, settled=any(row.settled for row, _ in tries)), image


def verdict(row: Row, control: Row) -> str:
    """Compare an attack with the one on the same image and network without noise."""
    if row.matched:
        return "leaks" if row.ssim > row.mean_ssim else "explained, nothing gained"
    if row is control:
        return "no evidence: no image was found that explains the update"
    if not row.settled or not control.matched:
        return "no evidence: the attack did not converge"
    return "more than the mean image" if row.ssim > row.mean_ssim else "nothing gained"


def table(rows: list[Row]) -> str:
    """The rows in markdown."""
    lines = [
        "| patient | network | noise | SSIM | mean image | PSNR | mean image | cosine distance | shows |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.patient} | {row.victim} | {row.noise} | {row.ssim:.3f} | {row.mean_ssim:.3f} | {row.psnr:.1f} | "
            f"{row.mean_psnr:.1f} | {row.first_distance:.3f} to {row.distance:.4f} | {row.verdict} |"
        )
    seconds = sum(row.seconds for row in rows) / len(rows)
    lines += [
        "",
        f"Attacker: {rows[0].iterations} iterations, {seconds:.0f} s for each try on one core (two tries against",
        "noise, the better one is shown). He knows the mask, where the slice is not padding, and the mean image",
        "of others.",
    ]
    return "\n".join(lines) + "\n"


def draw(pictures: dict[int, dict[str, torch.Tensor]], path: Path) -> None:
    """A row per patient."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = list(next(iter(pictures.values())))
    figure, places = pyplot.subplots(
        len(pictures), len(columns), squeeze=False, figsize=(2 * len(columns), 2.2 * len(pictures))
    )
    for line, (patient, images) in zip(places, pictures.items(), strict=True):
        for place, name in zip(line, columns, strict=True):
            place.imshow(images[name], cmap="gray", vmin=0, vmax=1)
            place.set_title(f"{name}, {patient}", fontsize=8)
            place.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    """Run all attacks, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patients", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=Attacker.iterations)
    parser.add_argument("--folder", type=Path, default=Path("runs/inversion"))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    os.nice(19)
    chosen.folder.mkdir(parents=True, exist_ok=True)
    sigma = noise_for(PRIVACY.epsilon, PRIVACY.delta, BATCH / RECORDS, STEPS)
    victims, mean = hippocampus(chosen.patients)
    rows: list[Row] = []
    pictures: dict[int, dict[str, torch.Tensor]] = {}
    for number, make, noise, used in attacks(sigma, chosen.patients):
        victim = victims[number]
        row, found = attack(make, victim, mean, used, noise, chosen.iterations)
        controls = [r for r in rows if (r.patient, r.victim, r.noise) == (row.patient, row.victim, "none")]
        row = replace(row, verdict=verdict(row, (controls or [row])[0]))
        rows.append(row)
        print(row, flush=True)
        if make is smooth and used in (None, sigma):
            shown = pictures.setdefault(victim.patient, {"image": victim.image, "mean image": mean * victim.content})
            shown["without DP" if used is None else "with DP"] = found
        (chosen.folder / "inversion.json").write_text(json.dumps([asdict(r) for r in rows], indent=2))
        (chosen.folder / "inversion.md").write_text(table(rows))
    draw(pictures, chosen.folder / "inversion.png")


if __name__ == "__main__":
    main()
