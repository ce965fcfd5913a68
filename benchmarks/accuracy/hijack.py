"""Hijacking of a site's layers by the server's gradients, and a guard at the site that looks at these gradients.

    python -m benchmarks.accuracy.hijack                      all of it (an hour on one core)
    python -m benchmarks.accuracy.hijack --case heart         one example (minutes)

Attack: FSHA (Pasquini, Ateniese and Bernaschi, CCS 2021). The server trains a pilot and a decoder on data of its own,
and a discriminator that tells the site's activations from the pilot's (Wasserstein, gradient penalty 10). It answers
with the gradient by which the former become like the latter. "Mixed": a share of the honest gradient is added.

Guard: Gradients Scrutinizer (Fu et al., NDSS 2023). If the server trains on labels, gradients of two samples with one
label are more alike than those of two with different labels: mean cosine of the former less that of the latter, in a
batch. A regression has two labels here, below and above the mean.

The site's layers, their bounds, the plan and the batches are those of a real run, with window 1.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from msgspec.structs import replace
from torch import nn
from torch.nn import functional

from benchmarks.accuracy.similarity import ssim
from benchmarks.accuracy.study import EXAMPLES, folder_of
from nightsplit.server_worker.stream.top import Top
from nightsplit.shared.config.load import load
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.learning.optimizers import START
from nightsplit.shared.protocols.build import build_split_model
from nightsplit.shared.protocols.load import load_run
from nightsplit.shared.protocols.plan import Purpose
from nightsplit.site_worker.config import SiteConfig
from nightsplit.site_worker.data.dataset import Splits
from nightsplit.site_worker.data.scaling import scale
from nightsplit.site_worker.data.source import read_splits
from nightsplit.site_worker.stream.batches import StreamBatches
from nightsplit.site_worker.stream.bottom import Bottom

WINDOW = 9
"""Batches over which the guard averages."""
BATCH = 32
"""Samples of the attacker's own data in a step."""


@dataclass(frozen=True)
class Case:
    """Example with the attacked site and the patients of the attacker.

    Attributes:
        name: folder of the example.
        victim: file of the attacked site.
        others: files with the attacker's patients.
        share, others_share: shares of the patients.
        steps: steps of the discriminator for each batch.
        pilot_steps: steps of pilot and decoder beforehand.
    """

    name: str
    victim: str
    others: Sequence[str]
    share: tuple[float, float] = (0.0, 1.0)
    others_share: tuple[float, float] = (0.0, 1.0)
    steps: int = 5
    pilot_steps: int = 2000


CASES = (
    Case("heart", "cleveland", ["cleveland"], (0.0, 0.5), (0.5, 1.0)),
    Case("cholesterol", "north", ["south", "east"]),
    Case("lung_ct", "north", ["south", "east"], steps=2, pilot_steps=300),
)
ATTACKS: Mapping[str, float] = {"honest": 1.0, "FSHA": 0.0, "mixed, 0.3 honest": 0.3, "mixed, 0.7 honest": 0.7}
"""Share of the honest gradient by name; an honest server looks at the activations with the same decoder."""


class Hijacker:
    """Server that makes the site's activations decodable.

    Args:
        own: the attacker's data (n, ...).
        cut: shape of the activations of a sample.
        top: layers whose gradient is the share `mix` of the answer.
    """

    def __init__(self, own: torch.Tensor, cut: torch.Size, case: Case, top: Top, mix: float) -> None:
        self._own, self._steps, self._top, self._mix = own, case.steps, top, mix
        self._pilot, self._decoder, self._discriminator = _networks(own.shape[1:], cut)
        coders = [*self._pilot.parameters(), *self._decoder.parameters()]
        optimizer = torch.optim.Adam(coders, 1e-3)
        self._optimizer = torch.optim.Adam(self._discriminator.parameters(), 1e-3, betas=(0.5, 0.9))
        for _ in range(case.pilot_steps):
            batch = self._draw()
            loss = functional.mse_loss(self._decoder(self._pilot(batch)), batch)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()

    def gradient(self, smashed: torch.Tensor, targets: torch.Tensor, step: int) -> torch.Tensor:
        """Return the gradient (batch, *cut) for a batch."""
        for _ in range(self._steps):
            self._discriminate(smashed)
        inputs = smashed.clone().requires_grad_()
        (hijack,) = torch.autograd.grad(-self._discriminator(inputs).mean(), inputs)
        _, honest = self._top.train_step(smashed, targets, step, START)
        size = _size(honest)
        return size * ((1 - self._mix) * hijack / (_size(hijack) + 1e-12) + self._mix * honest / (size + 1e-12))

    def decode(self, smashed: torch.Tensor) -> torch.Tensor:
        """Return the attacker's reconstruction of the samples."""
        with torch.no_grad():
            decoded: torch.Tensor = self._decoder(smashed)
        return decoded

    def _draw(self) -> torch.Tensor:
        return self._own[torch.randint(len(self._own), (min(BATCH, len(self._own)),))]

    def _discriminate(self, smashed: torch.Tensor) -> None:
        with torch.no_grad():
            real = self._pilot(self._draw())
        fake = smashed[torch.randint(len(smashed), (len(real),))]
        share = torch.rand(len(real), *[1] * (real.dim() - 1))
        between = (share * real + (1 - share) * fake).requires_grad_()
        (slope,) = torch.autograd.grad(self._discriminator(between).sum(), between, create_graph=True)
        penalty = ((slope.flatten(1).norm(dim=1) - 1) ** 2).mean()
        loss = self._discriminator(fake).mean() - self._discriminator(real).mean() + 10 * penalty
        self._optimizer.zero_grad()
        torch.autograd.backward(loss)
        self._optimizer.step()


def _size(gradient: torch.Tensor) -> float:
    return float(gradient.flatten(1).norm(dim=1).mean())


def _networks(inputs: torch.Size, cut: torch.Size) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Return pilot, decoder and discriminator for tables, or for images that the site halves."""
    if len(inputs) == 1:
        width, wide = inputs[0], cut[0]
        pilot = nn.Sequential(nn.Linear(width, wide), nn.ReLU())
        return pilot, _perceptron(wide, 128, width), _perceptron(wide, 64, 1)
    channels, maps = inputs[0], cut[0]
    pilot = nn.Sequential(nn.Conv2d(channels, maps, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    decoder = nn.Sequential(
        nn.Conv2d(maps, 32, 3, padding=1), nn.ReLU(), nn.Upsample(scale_factor=2),
        nn.Conv2d(32, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, channels, 3, padding=1),
    )  # fmt: skip
    discriminator = nn.Sequential(
        nn.Conv2d(maps, 32, 3, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(32, 32, 3, 2, 1), nn.LeakyReLU(0.2),
        nn.Conv2d(32, 1, 3, 2, 1), nn.Flatten(), nn.Linear(cut[1] * cut[2] // 64, 1),
    )  # fmt: skip
    return pilot, decoder, discriminator


def _perceptron(inputs: int, hidden: int, outputs: int) -> nn.Module:
    layers = [nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)]
    return nn.Sequential(*layers)


def scrutiny(gradient: torch.Tensor, labels: torch.Tensor) -> float | None:
    """Return the guard's statistic for gradients (batch, ...) and labels (batch,); None with one label alone."""
    rows = gradient.flatten(1)
    kept = rows.norm(dim=1) > 0
    rows, labels = functional.normalize(rows[kept], dim=1), labels[kept]
    cosines, other = rows @ rows.T, labels[:, None] != labels[None]
    same = ~other & ~torch.eye(len(labels), dtype=torch.bool)
    return float(cosines[same].mean() - cosines[other].mean()) if same.any() and other.any() else None


def play(case: Case, seed: int, mix: float, longer: int) -> tuple[list[float], float, float]:
    """Attack a run that is `longer` times as long as the example's.

    Return the guard's statistic of each batch; how well training samples are reconstructed at the end (R2 over all
    features of a table, mean SSIM of images), and the attacker's mean sample likewise.
    """
    torch.manual_seed(seed)
    config = load_run(EXAMPLES / case.name / "run.toml")
    run = replace(config.run, seed=seed, window=1, epochs=longer * config.run.epochs, evaluate_every=10**6)
    config, secret = replace(config, run=run), f"{seed:032}".encode()
    splits = _read(config, case.name, case.victim, case.share)
    own = torch.cat([_read(config, case.name, file, case.others_share).train.inputs for file in case.others])
    model = build_split_model(config, folder_of(case.name), secret)
    bottom = Bottom(model.parts.bottom, config.optimizer.of("bottom"), "cpu")
    batches = StreamBatches(config, case.victim, splits, secret)
    samples = splits.train.inputs
    cut = bottom.module(samples[:1]).shape[1:]
    attacker = Hijacker(own, cut, case, Top(model.parts.top, config.optimizer.of("top"), config.task, "cpu"), mix)
    found: list[float] = []
    for q in range(1, batches.plan.last + 1):
        item = batches.plan.item(q)
        if item.purpose is Purpose.TRAIN:
            inputs, targets, dropout = batches.inputs(item), batches.targets(item), batches.seed("bottom", item)
            smashed = bottom.forward(item, inputs, dropout, training=True)
            gradient = attacker.gradient(smashed, targets, q)
            labels = targets > 0 if config.task.kind == "regression" else targets
            if (statistic := scrutiny(gradient, labels)) is not None:
                found.append(statistic)
            bottom.apply_gradient(item, inputs, dropout, gradient, batches.plan.progress(item))
        else:
            bottom.skip(item)
        bottom.forget(bottom.version)
    with torch.no_grad():
        read = attacker.decode(bottom.module(samples))
    return found, _likeness(read, samples), _likeness(own.mean(0).expand_as(samples), samples)


def _read(config: RunConfig, name: str, file: str, share: tuple[float, float]) -> Splits:
    source = load(folder_of(name) / f"{file}.toml", SiteConfig).data
    if share != (0.0, 1.0):
        source = replace(source, share=share)
    return scale(read_splits(source, config, folder_of(name)), config.data)


def _likeness(read: torch.Tensor, samples: torch.Tensor) -> float:
    if samples.dim() == 2:
        return 1 - float((read - samples).square().sum() / (samples - samples.mean(0)).square().sum())
    low, high = samples.amin(), samples.amax()
    pairs = zip(read[:64], samples[:64], strict=True)
    as_shown = [[((image[0] - low) / (high - low)).clamp(0, 1) for image in pair] for pair in pairs]
    return statistics.mean(ssim(a, b) for a, b in as_shown)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Hijacking by gradients, and a guard against it.")
    parser.add_argument("--case", choices=[case.name for case in CASES], action="append", help="this example alone")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--longer", type=int, default=1, metavar="N", help="so many times the example's epochs")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(
        f"| example, seed | server | batches | statistic: least of {WINDOW} | median | most of {WINDOW} | read | mean |"
    )
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for case in CASES:
        if case.name not in (chosen.case or [case.name]):
            continue
        for seed in range(1, chosen.seeds + 1):
            for name, mix in ATTACKS.items():
                found, read, mean = play(case, seed, mix, chosen.longer)
                windows = [statistics.mean(found[n : n + WINDOW]) for n in range(len(found) - WINDOW + 1)]
                figures = [min(windows), statistics.median(found), max(windows), read, mean]
                cells = " | ".join(f"{figure:.3f}" for figure in figures)
                print(f"| {case.name}, {seed} | {name} | {len(found)} | {cells} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
