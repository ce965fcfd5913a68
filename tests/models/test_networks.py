import re

import pytest
import torch
from torch import nn

from nightsplit.shared.models.networks import ct_cnn, mlp, small_cnn
from nightsplit.shared.models.segmentation import monet, unet

CASES = [
    (mlp(13, [32, 16], 1, dropout=0.1), (13,), (32,), 1),
    (mlp(4, [8], 3), (4,), (8,), 3),
    (small_cnn(), (1, 28, 28), (16, 14, 14), 1),
    (small_cnn(channels=3, outputs=4, width=8), (3, 28, 28), (8, 14, 14), 4),
    (ct_cnn(), (1, 64, 64), (16, 32, 32), 1),
    (ct_cnn(outputs=3, width=8), (1, 64, 64), (8, 32, 32), 3),
]


@pytest.mark.parametrize(("model", "inputs", "at_the_cut", "outputs"), CASES)
def test_shapes_at_the_cut_and_at_the_end(
    model: nn.Sequential, inputs: tuple[int, ...], at_the_cut: tuple[int, ...], outputs: int
) -> None:
    smashed = model[:1](torch.zeros(5, *inputs))
    assert smashed.shape == (5, *at_the_cut)
    assert model[1:](smashed).shape == (5, outputs)


@pytest.mark.parametrize("model", [case[0] for case in CASES])
def test_cut_1_leaves_one_hidden_layer_at_the_site(model: nn.Sequential) -> None:
    layers = [stage for stage in model[0].modules() if isinstance(stage, nn.Conv2d | nn.Linear)]
    assert len(layers) == 1
    assert any(isinstance(stage, nn.ReLU) for stage in model[0].modules())


@pytest.mark.parametrize("model", [case[0] for case in CASES])
def test_the_last_stage_is_the_output_layer(model: nn.Sequential) -> None:
    name, output = list(model.named_children())[-1]
    assert name == "output"
    assert sum(isinstance(stage, nn.Linear) for stage in output.modules()) == 1


@pytest.mark.parametrize("model", [case[0] for case in CASES])
def test_what_a_site_sends_does_not_depend_on_mode_or_batch(model: nn.Sequential) -> None:
    """No batch statistics anywhere, and no dropout at the site."""
    assert not list(model.buffers())
    assert not any(isinstance(stage, nn.Dropout) for stage in model[0].modules())


@pytest.mark.parametrize("model", [case[0] for case in CASES])
def test_every_weight_gets_a_gradient(model: nn.Sequential) -> None:
    inputs = next(case[1] for case in CASES if case[0] is model)
    torch.manual_seed(0)
    model(torch.randn(4, *inputs)).square().sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.parameters())


@pytest.mark.parametrize(
    ("factory", "model"),
    [
        (mlp, mlp(13, [32, 16], 1)),
        (small_cnn, small_cnn()),
        (ct_cnn, ct_cnn()),
        (unet, unet()),
        (monet, monet()),
    ],
)
def test_the_docstring_tells_the_number_of_parameters(factory: object, model: nn.Module) -> None:
    said = re.search(r"Parameters.*?: ([\d,]+)\.\n", factory.__doc__ or "", re.DOTALL)
    assert said is not None
    assert int(said[1].replace(",", "")) == sum(weight.numel() for weight in model.parameters())


def test_an_mlp_needs_a_hidden_layer() -> None:
    with pytest.raises(ValueError, match="hidden is empty"):
        mlp(3, [], 1)


SEGMENTATION = {
    "unet": unet(),
    "plain": unet(width=4, fold=1, coordinates=False, smooth=True),
    "monet": monet(width=4),
}


@pytest.fixture(params=SEGMENTATION)
def segmentation(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return SEGMENTATION[request.param].eval()


def test_one_logit_per_pixel(segmentation: nn.Module) -> None:
    assert segmentation(torch.randn(3, 1, 24, 32)).shape == (3, 1, 24, 32)


def test_a_segmentation_starts_as_background(segmentation: nn.Module) -> None:
    assert segmentation(torch.randn(3, 1, 32, 32)).sigmoid().mean() < 0.2


def test_records_of_a_batch_do_not_meet(segmentation: nn.Module) -> None:
    images = torch.randn(4, 1, 32, 32)
    alone = torch.cat([segmentation(image[None]) for image in images])
    torch.testing.assert_close(segmentation(images), alone, rtol=0, atol=1e-5)
    assert not list(segmentation.buffers())


def test_every_weight_of_a_segmentation_gets_a_gradient(segmentation: nn.Module) -> None:
    segmentation.zero_grad()
    segmentation(torch.randn(2, 1, 32, 32)).square().sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in segmentation.parameters())


def test_the_u_net_knows_where_it_is() -> None:
    shifted = unet()(torch.zeros(1, 1, 32, 32))
    assert shifted[..., :16].std() > 1e-3
    blind = unet(fold=1, coordinates=False)(torch.zeros(1, 1, 64, 64))[..., 24:40, 24:40]
    assert blind.std() < 1e-5  # far from the edges, all places look alike


def test_the_long_skips_of_monet_fire() -> None:
    """An edge reaches the output though nothing comes up from the bottom."""
    model = monet(width=4).eval()
    with torch.no_grad():
        for name in ("double_bottom", "double_second"):
            getattr(model, name)[1].weight.zero_()
    image = torch.zeros(1, 1, 32, 32)
    image[..., 16:] = 1.0
    assert (model(image) - model(image.flip(-1))).abs().max() > 1e-3
