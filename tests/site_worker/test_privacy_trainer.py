"""Clipping and noise, against the plain trainer and against one record at a time."""

import copy
from collections.abc import Callable
from math import inf
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from torch import nn

from nightsplit.shared.config.optimizer import OptimizerSection
from nightsplit.shared.config.run import (
    DataSection,
    ModelSection,
    PrivacySection,
    RoundSection,
    RunConfig,
    RunSection,
    TaskSection,
)
from nightsplit.shared.errors import RunError
from nightsplit.shared.learning.losses import loss_of
from nightsplit.shared.learning.optimizers import START, Progress
from nightsplit.shared.models.networks import ct_cnn, mlp
from nightsplit.shared.models.segmentation import monet, unet
from nightsplit.site_worker.data.dataset import Dataset, Splits
from nightsplit.site_worker.privacy.batches import PrivateBatches
from nightsplit.site_worker.privacy.secret import Secret
from nightsplit.site_worker.privacy.trainer import PrivateTrainer
from nightsplit.site_worker.rounds.trainer import Trainer

SECRET = Secret(bytes(range(32)))
N = 6


def config_of(kind: str, optimizer: str = "adam", **round_: Any) -> RunConfig:
    return RunConfig(
        run=RunSection(id="night-1", protocol="fedavg_transfer", sites=["mercy"]),
        model=ModelSection(factory="x:y"),
        task=TaskSection(kind=kind, classes=3),  # type: ignore[arg-type]
        optimizer=OptimizerSection(name=optimizer, lr=1e-2),  # type: ignore[arg-type]
        round=RoundSection(**round_),
        data=DataSection(image_size=8, scaling="none"),
    )


def private(
    module: nn.Module, config: RunConfig, clip: float = inf, sigma: float = 0.0, batch: float = N, secure: bool = False
) -> PrivateTrainer:
    section = PrivacySection(epsilon=1.0, delta=1e-4, clip=clip, secure=secure)
    return PrivateTrainer(module, config, "cpu", section, SECRET, sigma, batch)


class Awkward(nn.Module):
    """Convolutions with stride, dilation, groups, padding by name and frozen weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, (3, 2), stride=(2, 1), padding=(1, 0)), nn.SiLU(),
            nn.Conv2d(4, 4, 3, dilation=(2, 1), groups=2), nn.SiLU(),
            nn.Conv2d(4, 3, 3, padding="same"), nn.SiLU(),
            nn.Conv2d(3, 3, (2, 3), stride=(1, 2), dilation=(1, 2), padding=2, bias=False), nn.SiLU(),
            nn.ConvTranspose2d(3, 3, 4, stride=2), nn.SiLU(),
            nn.ConvTranspose2d(3, 2, (3, 2), stride=(2, 1), padding=1, output_padding=(1, 0)),
            nn.InstanceNorm2d(2, affine=True), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3),
        )  # fmt: skip

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.layers(images)
        return outputs


IMAGES = (1, 16, 16)
CASES: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "mlp": (lambda: mlp(5, [8], 1), "binary", (5,)),
    "cnn": (lambda: ct_cnn(outputs=3, width=4, side=16, dropout=0.0), "multiclass", IMAGES),
    "awkward": (Awkward, "multiclass", IMAGES),
    "unet": (lambda: unet(width=4), "segmentation", IMAGES),
    "smooth": (lambda: unet(width=4, fold=1, smooth=True), "segmentation", IMAGES),
    "monet": (lambda: monet(width=4, dropout=0.0), "segmentation", IMAGES),
    "regression": (lambda: mlp(5, [8], 1), "regression", (5,)),
}


def batch_of(kind: str, shape: tuple[int, ...], count: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, *shape, generator=generator)
    targets = {
        "binary": torch.randint(0, 2, (count,), generator=generator).float(),
        "multiclass": torch.randint(0, 3, (count,), generator=generator),
        "regression": torch.randn(count, generator=generator),
        "segmentation": (torch.rand(count, *shape[1:], generator=generator) < 0.2).float(),
    }
    return inputs, targets[kind]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, RunConfig, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    make, kind, shape = CASES[request.param]
    return make(), config_of(kind), *batch_of(kind, shape)


Case = tuple[nn.Module, RunConfig, torch.Tensor, torch.Tensor]


def test_gradients_are_those_of_single_records(case: Case) -> None:
    module, config, inputs, targets = case
    alone = copy.deepcopy(module).train()
    _, gradients = private(module, config).gradients(inputs, targets, 0)
    for row in range(N):
        alone.zero_grad()
        loss_of(config.task, alone(inputs[row : row + 1]), targets[row : row + 1]).backward()
        for (name, parameter), gradient in zip(alone.named_parameters(), gradients, strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(gradient[row], parameter.grad, rtol=1e-5, atol=1e-5, msg=f"{name}, {row}")


def test_without_noise_and_clipping_it_is_the_plain_step(case: Case) -> None:
    module, config, inputs, targets = case
    config = replace(config, round=replace(config.round, decay="cosine"))
    plain = Trainer(copy.deepcopy(module), config, "cpu")
    trainer = private(module, config)
    for step in range(3):
        middle = Progress(step, 1, 2)
        expected = plain.step(inputs, targets, step, middle)
        assert trainer.step(inputs, targets, step, middle) == pytest.approx(expected, rel=1e-4)
    # Adam divides by the gradient's size, so that a rounded zero may make a step of its own: compare what was learnt.
    torch.testing.assert_close(trainer.predict(inputs), plain.predict(inputs), rtol=1e-3, atol=1e-3)


def test_what_happens_between_steps_does_not_matter() -> None:
    """Opacus keeps what each layer was given until a backward comes: a forward without one must leave nothing."""
    torch.manual_seed(0)
    module = unet(width=4)
    inputs, targets = batch_of("segmentation", IMAGES)
    _, expected = private(copy.deepcopy(module), config_of("segmentation")).gradients(inputs, targets, 0)
    trainer = private(module, config_of("segmentation"))
    trainer.predict(torch.randn(3, *IMAGES))
    trainer.gradients(torch.randn(N, *IMAGES), targets, 0)
    trainer.predict(torch.randn(N, *IMAGES))
    _, gradients = trainer.gradients(inputs, targets, 0)
    for one, other in zip(expected, gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_dropout_is_seeded() -> None:
    torch.manual_seed(0)
    module = monet(width=4)
    inputs, targets = batch_of("segmentation", IMAGES)
    plain, trainer = (
        Trainer(copy.deepcopy(module), config_of("segmentation", "sgd"), "cpu"),
        private(module, config_of("segmentation", "sgd")),
    )
    losses = [trainer.step(inputs, targets, seed, START) for seed in (1, 1, 2)]
    assert losses[0] == pytest.approx(plain.step(inputs, targets, 1, START), rel=1e-4)
    assert len(set(losses)) == 3


def moved(trainer: PrivateTrainer, *batch: torch.Tensor, seed: int = 3) -> torch.Tensor:
    """What a step of plain gradient descent at learning rate 0.01 subtracts, divided by that."""
    before = torch.cat([parameter.detach().flatten().clone() for parameter in trainer.trainable])
    trainer.step(*batch, seed, START)
    after = torch.cat([parameter.detach().flatten() for parameter in trainer.trainable])
    return (before - after) / 1e-2


def test_no_record_counts_for_more_than_the_clipping_norm() -> None:
    inputs, targets = batch_of("segmentation", IMAGES, 1)
    norms = []
    for scale in (1.0, 1e6):
        torch.manual_seed(0)
        trainer = private(unet(width=4), config_of("segmentation", "sgd"), clip=0.05, batch=1)
        norms.append(moved(trainer, scale * inputs, targets).norm().item())
    assert norms == pytest.approx([0.05, 0.05], rel=1e-2)


def test_small_gradients_are_not_clipped() -> None:
    torch.manual_seed(0)
    module = mlp(5, [8], 1)
    inputs, targets = batch_of("binary", (5,))
    config = config_of("binary", "sgd")
    free = moved(private(copy.deepcopy(module), config), inputs, targets)
    torch.testing.assert_close(moved(private(module, config, clip=100.0), inputs, targets), free)


def test_the_divisor_is_the_expected_size() -> None:
    """Dividing by the number that came would tell how many came, and is not what was accounted for."""
    torch.manual_seed(0)
    module = mlp(5, [8], 1)
    inputs, targets = batch_of("binary", (5,))
    config = config_of("binary", "sgd")
    one = moved(private(copy.deepcopy(module), config, batch=10), inputs, targets)
    other = moved(private(module, config, batch=N), inputs, targets)
    torch.testing.assert_close(10 * one, N * other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("secure", [False, True])
def test_an_empty_batch_is_noise_of_the_right_size(secure: bool) -> None:
    torch.manual_seed(0)
    trainer = private(unet(), config_of("segmentation", "sgd"), clip=0.5, sigma=3.0, batch=10, secure=secure)
    inputs, targets = batch_of("segmentation", IMAGES, 0)
    noise = moved(trainer, inputs, targets).numpy()
    assert trainer.step(inputs, targets, 4, START) == 0.0
    assert noise.std() == pytest.approx(0.5 * 3.0 / 10, rel=0.02)
    assert abs(noise.mean()) < 5 * 0.15 / np.sqrt(len(noise))


def test_a_replay_makes_the_same_step_and_other_gradients_get_other_noise() -> None:
    inputs, targets = batch_of("binary", (5,))
    config = config_of("binary", "sgd")

    def step(inputs: torch.Tensor, seed: int, sigma: float) -> torch.Tensor:
        torch.manual_seed(0)
        return moved(private(mlp(5, [32], 1), config, clip=1.0, sigma=sigma), inputs, targets, seed=seed)

    assert torch.equal(step(inputs, 3, 2.0), step(inputs, 3, 2.0))
    nearly = inputs * (1 + 1e-4)
    noise = step(inputs, 3, 2.0) - step(inputs, 3, 0.0)
    for other in (step(inputs, 4, 2.0) - step(inputs, 4, 0.0), step(nearly, 3, 2.0) - step(nearly, 3, 0.0)):
        assert abs(torch.corrcoef(torch.stack([noise, other]))[0, 1]) < 0.3


def test_a_snapshot_goes_on_to_the_bit() -> None:
    config = config_of("binary")
    inputs, targets = batch_of("binary", (5,))
    trainer = private(mlp(5, [8], 1), config, clip=1.0, sigma=1.0)
    trainer.step(inputs, targets, 1, START)
    kept = {name: tensor.clone() for name, tensor in trainer.state().items()}
    trainer.step(inputs, targets, 2, START)
    restored = private(mlp(5, [8], 1), config, clip=1.0, sigma=1.0)
    restored.restore(kept)
    restored.step(inputs, targets, 2, START)
    assert all(torch.equal(tensor, restored.state()[name]) for name, tensor in trainer.state().items())


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(5), nn.InstanceNorm1d(5, track_running_stats=True)])
def test_what_mixes_records_is_refused(norm: nn.Module) -> None:
    module = nn.Sequential(nn.Linear(5, 5), norm, nn.Linear(5, 1))
    with pytest.raises(RunError, match=r"1 is .*GroupNorm") as caught:
        private(module, config_of("binary"))
    assert caught.value.number == 610


def test_a_frozen_normalization_is_no_mixing() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(5)
    norm.running_mean = torch.randn(5)
    module = nn.Sequential(nn.Linear(5, 5), norm, nn.Linear(5, 1))
    config = config_of("binary", freeze=["1"])
    inputs, targets = batch_of("binary", (5,))
    plain = Trainer(copy.deepcopy(module), config, "cpu")
    trainer = private(module, config)
    trainer.step(inputs, targets, 1, START)
    plain.step(inputs, targets, 1, START)
    torch.testing.assert_close(trainer.predict(inputs), plain.predict(inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "layer", [nn.LSTM(5, 1), nn.MultiheadAttention(4, 2), nn.ConvTranspose2d(4, 4, 2, groups=2)], ids=repr
)
def test_layers_without_a_rule_are_refused(layer: nn.Module) -> None:
    with pytest.raises(RunError, match=type(layer).__name__) as caught:
        private(nn.Sequential(nn.Linear(5, 5), layer), config_of("binary"))
    assert caught.value.number == 610


def test_a_loss_that_is_not_finite_stops_before_the_step() -> None:
    module = mlp(5, [8], 1)
    trainer = private(module, config_of("binary"))
    before = trainer.weights()
    inputs, targets = batch_of("binary", (5,))
    with pytest.raises(RunError) as caught:
        trainer.step(inputs * inf, targets, 1, START)
    assert caught.value.number == 603
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.weights().items())


def test_batches_are_poisson_samples_that_only_the_secret_tells() -> None:
    data = Dataset(torch.arange(40.0)[:, None], torch.zeros(40), tuple(map(str, range(40))))
    nothing = data.select([])

    def batches(secret: Secret) -> PrivateBatches:
        return PrivateBatches(config_of("binary"), "mercy", Splits(data, nothing, nothing), secret, 0.1)

    rows = [batches(SECRET).rows(k).tolist() for k in range(200)]
    assert rows == [batches(SECRET).rows(k).tolist() for k in range(200)]
    assert rows != [batches(SECRET.derive("other")).rows(k).tolist() for k in range(200)]
    assert len({len(r) for r in rows}) > 5
    assert any(not r for r in rows)
    empty = rows.index([])
    inputs, targets = batches(SECRET).batch(empty)
    assert inputs.shape == (0, 1)
    assert targets.shape == (0,)
    assert batches(SECRET).seed("trainer", 1) != batches(SECRET.derive("other")).seed("trainer", 1)
