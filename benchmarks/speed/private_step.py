"""Cost of a training step with differential privacy over a plain one.

    python -m benchmarks.speed.private_step [--quick] [--rounds N] [--json FILE]

Plain trainer, private trainer, and the private one with Opacus' own rules for convolutions take turns within a
round, on the same random images of 64 x 64 pixels and one torch thread. Ratios of the fastest step of each.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from opacus.grad_sample import GradSampleModule
from torch import nn

from benchmarks.speed.figures import Figure, Results, arguments
from nightsplit.shared.config.run import DataSection, ModelSection, PrivacySection, RunConfig, RunSection, TaskSection
from nightsplit.shared.learning.optimizers import START
from nightsplit.shared.models.segmentation import monet, unet
from nightsplit.shared.runtime.process import prepare_torch
from nightsplit.site_worker.privacy.hooks import PerSampleModule
from nightsplit.site_worker.privacy.secret import Secret
from nightsplit.site_worker.privacy.trainer import PrivateTrainer
from nightsplit.site_worker.rounds.trainer import Trainer

CONFIG = RunConfig(
    run=RunSection(id="steps", protocol="fedavg_dp_seg", sites=["one"]),
    model=ModelSection(factory="nightsplit.models:unet"),
    task=TaskSection(kind="segmentation"),
    data=DataSection(image_size=64),
)
CASES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "unet_b64": (unet, 64),
    "unet_b128": (unet, 128),
    "small_unet_b128": (partial(unet, width=4), 128),
    "monet_b16": (monet, 16),
}
FIGURES = [
    figure
    for case in CASES
    for figure in (
        Figure(f"{case}_over_plain", f"{case}: private over plain step", 2.0, 2.5, lower_is_better=True),
        Figure(f"{case}_secure_over_plain", f"{case}: with the secure stream", 2.0, 2.5, lower_is_better=True),
        Figure(f"{case}_opacus_over_plain", f"{case}: with Opacus' rules for convolutions"),
        Figure(f"{case}_plain_ms", f"{case}: plain step, ms"),
    )
]


def trainers_of(make: Callable[[], nn.Module], batch: int) -> dict[str, Trainer]:
    """Return the trainers that take turns, by name."""

    def private(secure: bool) -> PrivateTrainer:
        privacy = PrivacySection(epsilon=8.0, delta=1e-4, clip=0.2, secure=secure)
        return PrivateTrainer(make(), CONFIG, "cpu", privacy, Secret(bytes(32)), 0.67, batch)

    ours, PerSampleModule.GRAD_SAMPLERS = PerSampleModule.GRAD_SAMPLERS, GradSampleModule.GRAD_SAMPLERS
    opacus = private(secure=False)
    opacus._hooked.GRAD_SAMPLERS = PerSampleModule.GRAD_SAMPLERS  # they are looked up again when a hook fires
    PerSampleModule.GRAD_SAMPLERS = ours
    return {"plain": Trainer(make(), CONFIG, "cpu"), "": private(False), "secure_": private(True), "opacus_": opacus}


def measure(case: str, steps: int) -> dict[str, float]:
    """A round of a case."""
    make, batch = CASES[case]
    trainers = trainers_of(make, batch)
    images, masks = torch.rand(batch, 1, 64, 64), (torch.rand(batch, 64, 64) < 0.1).float()
    best = dict.fromkeys(trainers, float("inf"))
    for step in range(steps):
        for name, trainer in trainers.items():
            began = time.perf_counter()
            trainer.step(images, masks, step, START)
            best[name] = min(best[name], time.perf_counter() - began)
    plain = best.pop("plain")
    ratios = {f"{case}_{name}over_plain": seconds / plain for name, seconds in best.items()}
    return {**ratios, f"{case}_plain_ms": 1e3 * plain}


def main() -> None:
    """Measure all cases in rounds."""
    chosen = arguments(__doc__ or "", rounds=5).parse_args()
    prepare_torch(1, "cpu")
    results = Results(FIGURES, chosen.patience, chosen.retries, None)
    for _ in range(2 if chosen.quick else chosen.rounds):
        for case in CASES:
            results.round(case, partial(measure, case, 3 if chosen.quick else 8))
    results.finish("a private training step", chosen.json)


if __name__ == "__main__":
    main()
