"""The attack is measured, so it has to work where it should, and to say so where it did not."""

import math

import pytest
import torch
from torch import nn

from benchmarks.accuracy.inversion_attack import Attacker, Inversion, invert
from benchmarks.accuracy.similarity import psnr, ssim
from nightsplit.shared.config.run import TaskSection
from nightsplit.shared.learning.losses import loss_of
from nightsplit.shared.models.segmentation import unet


def test_psnr() -> None:
    image = torch.rand(20, 20)
    assert psnr(image, image) == math.inf
    assert psnr(torch.full((20, 20), 0.6), torch.full((20, 20), 0.5)) == pytest.approx(20.0, abs=1e-4)
    assert psnr(torch.full((20, 20), 0.51), torch.full((20, 20), 0.5)) == pytest.approx(40.0, abs=1e-3)


def test_ssim_of_plain_images_follows_from_its_definition() -> None:
    image = torch.rand(20, 20)
    assert ssim(image, image) == pytest.approx(1.0)
    # Without any variance the first factor alone is left: (2 a b + c1) / (a² + b² + c1).
    a, b, c1 = 0.2, 0.6, 0.01**2
    value = ssim(torch.full((15, 15), a), torch.full((15, 15), b))
    assert value == pytest.approx((2 * a * b + c1) / (a**2 + b**2 + c1), abs=1e-6)


def test_ssim_of_one_window_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(11, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    weights = torch.tensor(
        [[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for j in range(11)] for i in range(11)],
        dtype=torch.float64,
    )
    weights /= weights.sum()
    mx, my = (weights * x).sum(), (weights * y).sum()
    vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
    together = (weights * (x - mx) * (y - my)).sum()
    c1, c2 = 1e-4, 9e-4
    expected = (2 * mx * my + c1) * (2 * together + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert ssim(x, y) == pytest.approx(expected.item(), abs=1e-9)


def test_ssim_sees_structure() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(30, 30, generator=generator)
    noise = torch.randn(30, 30, generator=generator)
    values = [ssim((image + level * noise).clamp(0, 1), image) for level in (0.01, 0.1, 0.3)]
    assert values == sorted(values, reverse=True)
    assert ssim(1 - image, image) < 0


SIDE = 16
Secret = tuple[nn.Module, torch.Tensor, torch.Tensor, list[torch.Tensor]]


@pytest.fixture(scope="module")
def secret() -> Secret:
    """A model, an image with an edge and a spot, its mask, and the gradient."""
    torch.manual_seed(0)
    model = unet(fold=1, coordinates=False, smooth=True)
    image = torch.zeros(SIDE, SIDE)
    image[2:14, 2:8], image[2:14, 8:14], image[4:7, 4:7] = 0.3, 0.7, 0.9
    mask = torch.zeros(SIDE, SIDE)
    mask[3:9, 3:9] = 1.0
    loss = loss_of(TaskSection(kind="segmentation"), model(image[None, None]), mask[None])
    return model, image, mask, list(torch.autograd.grad(loss, list(model.parameters())))


def attack(secret: Secret, gradient: list[torch.Tensor], iterations: int = 250) -> Inversion:
    model, _, mask, _ = secret
    content = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    content[2:14, 2:14] = True
    start = torch.full((SIDE, SIDE), 0.5)
    found = invert(model, gradient, mask, start, content, Attacker(iterations, variation=1e-3))
    assert not found.image[~content].any()
    assert 0 <= found.image.min() <= found.image.max() <= 1
    return found


def gain(secret: Secret, found: Inversion) -> float:
    """SSIM above that of the start, within the content."""
    truth, guess = secret[1][2:14, 2:14], found.image[2:14, 2:14]
    return ssim(guess, truth) - ssim(torch.full_like(truth, 0.5), truth)


@pytest.fixture(scope="module")
def clear(secret: Secret) -> Inversion:
    """What the attack finds without noise."""
    return attack(secret, secret[3])


def test_a_gradient_gives_its_image_away(secret: Secret, clear: Inversion) -> None:
    assert clear.matched
    assert clear.distance < clear.first_distance / 10
    assert gain(secret, clear) > 0.2


def test_noise_hides_it_and_the_attack_says_that_it_found_nothing(secret: Secret, clear: Inversion) -> None:
    generator = torch.Generator().manual_seed(1)
    size = torch.cat([part.flatten() for part in secret[3]]).norm()
    noisy = [part + size * 0.67 * torch.randn(part.shape, generator=generator) for part in secret[3]]
    found = attack(secret, noisy)
    assert not found.matched
    assert gain(secret, found) < gain(secret, clear) / 2


def test_an_attack_that_was_cut_short_has_not_matched(secret: Secret) -> None:
    found = attack(secret, secret[3], iterations=3)
    assert not found.matched


def test_the_model_is_left_as_it_was(secret: Secret) -> None:
    before = [parameter.detach().clone() for parameter in secret[0].parameters()]
    attack(secret, secret[3], iterations=3)
    for old, new in zip(before, secret[0].parameters(), strict=True):
        assert torch.equal(old, new)
        assert new.grad is None
