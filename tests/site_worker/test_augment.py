import pytest
import torch

from nightsplit.site_worker.data.augment import augment

ALL = ["flip", "shift", "rotate", "zoom", "contrast"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(channels: int = 1, height: int = 16, width: int = 16) -> torch.Tensor:
    return torch.rand(8, channels, height, width, generator=generator(99))


@pytest.mark.parametrize("names", [[], ALL, *([name] for name in ALL)])
@pytest.mark.parametrize("channels", [1, 3])
def test_deterministic_of_equal_shape_and_without_side_effects(names: list[str], channels: int) -> None:
    images = batch(channels)
    before = images.clone()
    first, again, other = (augment(images, names, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(images, before)
    assert first.shape == images.shape
    assert first.dtype == images.dtype
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (not names)


def test_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    augment(batch(), ALL, generator())
    assert torch.equal(torch.get_rng_state(), state)


def test_flip_is_exact() -> None:
    images = batch(width=17)
    flipped = augment(images, ["flip"], generator())
    kinds = set()
    for before, after in zip(images, flipped, strict=True):
        assert torch.equal(after, before) or torch.equal(after, before.flip(-1))
        kinds.add(torch.equal(after, before))
    assert kinds == {True, False}


def test_contrast_does_not_depend_on_the_scaling() -> None:
    images = batch()
    scaled = augment(images * 3 - 7, ["contrast"], generator())
    assert torch.allclose(scaled, augment(images, ["contrast"], generator()) * 3 - 7, atol=1e-5)


def centre_and_area(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Centre (n, 2) in pixels, as (x, y), and brightness in all, of spots on black."""
    area = images.sum((1, 2, 3))
    x = (images.sum((1, 2)) * torch.arange(images.shape[3])).sum(1) / area
    y = (images.sum((1, 3)) * torch.arange(images.shape[2])).sum(1) / area
    return torch.stack([x, y], 1), area


def spots(height: int, width: int, row: int, column: int) -> torch.Tensor:
    images = torch.zeros(64, 1, height, width)
    images[:, :, row - 3 : row + 4, column - 3 : column + 4] = 1
    return images


def test_shift_moves_by_up_to_a_tenth() -> None:
    centre, _ = centre_and_area(augment(spots(40, 80, 20, 40), ["shift"], generator()))
    moved = (centre - torch.tensor([40.0, 20.0])).abs().amax(0)
    assert 6 < moved[0] < 8.1
    assert 3 < moved[1] < 4.1


def test_zoom_keeps_the_centre_and_changes_the_area() -> None:
    centre, area = centre_and_area(augment(spots(41, 41, 20, 20), ["zoom"], generator()))
    assert torch.allclose(centre, torch.full((64, 2), 20.0), atol=0.02)
    assert area.min() / 49 == pytest.approx(0.81, abs=0.05)
    assert area.max() / 49 == pytest.approx(1.21, abs=0.05)


def test_rotation_keeps_the_distance_from_the_centre_in_wide_images_too() -> None:
    centre, area = centre_and_area(augment(spots(41, 81, 20, 70), ["rotate"], generator()))
    offset = centre - torch.tensor([40.0, 20.0])
    assert torch.allclose(offset.norm(dim=1), torch.full((64,), 30.0), atol=0.2)
    angle = torch.atan2(offset[:, 1], offset[:, 0]).rad2deg()
    assert 8 < angle.abs().max() < 10.1
    assert torch.allclose(area, torch.full((64,), 49.0), atol=1)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="sharpen"):
        augment(batch(), ["sharpen"], generator())
