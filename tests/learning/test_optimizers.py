"""Update rules, learning rates and clipping of a part of the model."""

import pytest
import torch
from msgspec.structs import replace
from torch import nn

from nightsplit.shared.config.optimizer import OptimizerSection, PartSection
from nightsplit.shared.learning.bounds import norm_of
from nightsplit.shared.learning.optimizers import START, PartOptimizer, Progress, rate_at

RULES = [
    OptimizerSection(name="sgd", lr=0.1, momentum=0.9),
    OptimizerSection(name="adam", lr=0.01, betas=(0.5, 0.9)),
    OptimizerSection(name="adamw", lr=0.01, weight_decay=0.1),
    OptimizerSection(name="muon", lr=0.01, weight_decay=0.1),
]


def parameter_of(*shape, seed=0):
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


def steps(parameters, section, count=4, shapes=None):
    """Take steps with gradients that depend on the number of the step alone; `shapes` are those they are drawn in."""
    optimizer = PartOptimizer(section, parameters)
    for step in range(count):
        for number, parameter in enumerate(parameters):
            drawn = torch.randn((shapes or {}).get(number, parameter.shape), generator=draw(step, number))
            parameter.grad = drawn.reshape(parameter.shape)
        optimizer.step(Progress(step, step, count))
    return optimizer


def draw(step, number):
    return torch.Generator().manual_seed(100 * step + number)


# ── Muon ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shape", [(8, 8), (16, 4), (4, 64), (6, 3, 3, 3), (32, 2, 3), (1, 16), (4, 2, 3, 3, 3)])
def test_a_step_of_muon_is_an_orthogonal_matrix_times_the_learning_rate(shape):
    weight = parameter_of(*shape)
    before = weight.detach().clone()
    steps([weight], OptimizerSection(name="muon", lr=0.02), count=1)
    change = (before - weight.detach()).reshape(shape[0], -1) / 0.02
    rows, columns = change.shape
    values = torch.linalg.svdvals(change / max(1.0, rows / columns) ** 0.5)
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_a_step_of_adamw_is_not():
    weight = parameter_of(8, 8)
    before = weight.detach().clone()
    steps([weight], OptimizerSection(name="adamw", lr=0.02), count=1)
    values = torch.linalg.svdvals((before - weight.detach()) / 0.02)
    assert values.max() / values.min() > 10


def test_a_matrix_is_trained_as_by_torch():
    ours, theirs = parameter_of(6, 10), parameter_of(6, 10)
    steps([ours], RULES[3])
    muon = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1)
    for step in range(4):
        theirs.grad = torch.randn(6, 10, generator=draw(step, 0))
        muon.step()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_is_trained_as_its_matrix(layout):
    convolution, matrix = parameter_of(6, 2, 3, 3), parameter_of(6, 2, 3, 3)
    matrix = nn.Parameter(matrix.detach().reshape(6, 18))
    convolution.data = convolution.data.to(memory_format=layout)
    steps([convolution], RULES[3])
    steps([matrix], RULES[3])
    assert torch.equal(convolution.reshape(6, 18), matrix)
    assert convolution.is_contiguous(memory_format=layout)


def test_what_muon_does_not_train_is_trained_by_adamw():
    bias, alone, weight = parameter_of(7), parameter_of(7), parameter_of(5, 7)
    steps([bias, weight], replace(RULES[3], betas=(0.8, 0.95)))
    steps([alone], replace(RULES[2], betas=(0.8, 0.95)))
    assert torch.equal(bias, alone)


def test_weights_that_are_set_in_between_are_the_ones_that_are_trained():
    """As by a checkpoint, or the average of several sites: the copy of a convolution as a matrix must follow."""
    weight, fresh = parameter_of(4, 2, 3, 3), parameter_of(4, 2, 3, 3, seed=1)
    optimizer = PartOptimizer(OptimizerSection(name="muon", lr=1e-6), [weight])
    with torch.no_grad():
        weight.copy_(fresh)
    weight.grad = torch.ones_like(weight)
    optimizer.step(START)
    torch.testing.assert_close(weight, fresh, atol=1e-4, rtol=0)


# ── Every rule ──────────────────────────────────────────────────────────────────────────────────


def network():
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 3), nn.Linear(3, 1))


@pytest.mark.parametrize("section", RULES, ids=lambda section: section.name)
def test_a_restored_optimizer_continues_to_the_bit(section):
    section = replace(section, warmup=3, schedule="cosine", clip_norm=0.5)
    through, stopped, restored = network(), network(), network()

    def train(module, optimizer, first, last):
        for step in range(first, last):
            inputs = torch.randn(5, 1, 4, 4, generator=draw(step, 0))
            optimizer.zero_grad()
            module(inputs).square().sum().backward()
            optimizer.step(Progress(step, step, 8))

    train(through, PartOptimizer(section, through.parameters()), 0, 8)
    optimizer = PartOptimizer(section, stopped.parameters())
    train(stopped, optimizer, 0, 4)
    restored.load_state_dict(stopped.state_dict())
    resumed = PartOptimizer(section, restored.parameters())
    resumed.restore({key: tensor.clone() for key, tensor in optimizer.state().items()})
    train(restored, resumed, 4, 8)
    assert all(map(torch.equal, through.parameters(), restored.parameters()))
    fresh = network()
    fresh.load_state_dict(stopped.state_dict())
    train(fresh, PartOptimizer(section, fresh.parameters()), 4, 8)  # without its state it is another training
    assert not all(map(torch.equal, through.parameters(), fresh.parameters()))


@pytest.mark.parametrize("section", RULES, ids=lambda section: section.name)
def test_nothing_to_train_is_no_error(section):
    optimizer = PartOptimizer(section, [])
    optimizer.step(START)
    optimizer.restore(optimizer.state())


@pytest.mark.parametrize("section", RULES, ids=lambda section: section.name)
def test_frozen_weights_stay(section):
    frozen, other = parameter_of(3, 2, 2, 2), parameter_of(3, 3)
    before = frozen.detach().clone()
    optimizer = PartOptimizer(replace(section, weight_decay=0.0), [frozen, other])
    other.grad = torch.ones_like(other)
    optimizer.step(START)
    assert torch.equal(frozen, before)


# ── Learning rate ───────────────────────────────────────────────────────────────────────────────


def test_the_learning_rate_rises_and_falls():
    steady, warm = OptimizerSection(), OptimizerSection(warmup=4)
    falling, both = OptimizerSection(schedule="cosine"), OptimizerSection(warmup=4, schedule="cosine")
    at = [Progress(step, step, 8) for step in range(8)]
    assert [rate_at(steady, progress) for progress in at] == [1.0] * 8
    assert [rate_at(warm, progress) for progress in at] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]
    cosine = [rate_at(falling, progress) for progress in at]
    assert cosine[0] == 1.0
    assert cosine[4] == pytest.approx(0.5)
    assert cosine[2] == pytest.approx(0.8535533)
    assert cosine == sorted(cosine, reverse=True)
    assert [rate_at(both, p) for p in at] == [rate_at(warm, p) * rate_at(falling, p) for p in at]
    assert rate_at(falling, Progress(3, 8, 8)) == 0.0


@pytest.mark.parametrize("section", RULES, ids=lambda section: section.name)
def test_a_step_has_the_length_of_its_rate(section):
    section = replace(section, weight_decay=0.0)
    changes = []
    for warmup in (0, 4):
        weight = parameter_of(4, 4)
        before = weight.detach().clone()
        steps([weight], replace(section, warmup=warmup), count=1)
        changes.append(weight.detach() - before)
    torch.testing.assert_close(changes[1], changes[0] / 4, atol=1e-6, rtol=1e-4)


# ── Clipping ────────────────────────────────────────────────────────────────────────────────────


def applied(section, *limit):
    """Gradients of norm 5 as they are applied, by SGD with a learning rate of 1."""
    weights = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1, 1))]
    optimizer = PartOptimizer(replace(section, name="sgd", lr=1.0), weights)
    weights[0].grad, weights[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])
    optimizer.step(START, *limit)
    return [-weight.detach() for weight in weights]


def test_gradients_are_clipped_together():
    assert norm_of(applied(OptimizerSection(clip_norm=2.5))) == pytest.approx(2.5)
    assert [float(g.sum()) for g in applied(OptimizerSection(clip_norm=2.5))] == pytest.approx([1.5, 2.0])
    for untouched in (OptimizerSection(), OptimizerSection(clip_norm=5.0), OptimizerSection(clip_norm=100.0)):
        assert [float(g.sum()) for g in applied(untouched)] == [3.0, 4.0]


def test_an_outlier_is_first_scaled_and_then_clipped():
    assert norm_of(applied(OptimizerSection(clip_norm=2.0), lambda norm: 3 / norm)) == pytest.approx(2.0)
    assert norm_of(applied(OptimizerSection(clip_norm=4.0), lambda norm: 3 / norm)) == pytest.approx(3.0)
    assert norm_of(applied(OptimizerSection(), lambda norm: 3 / norm)) == pytest.approx(3.0)


# ── Parts ───────────────────────────────────────────────────────────────────────────────────────


def test_a_part_has_the_common_settings_but_for_its_own():
    section = OptimizerSection(lr=0.1, clip_norm=1.0, top=PartSection(name="muon", warmup=5, betas=(0.0, 0.9)))
    assert section.of("bottom") == section.of("head") == OptimizerSection(lr=0.1, clip_norm=1.0)
    top = OptimizerSection(name="muon", lr=0.1, clip_norm=1.0, warmup=5, betas=(0.0, 0.9))
    assert section.of("top") == top


# ── Gradients that come late ────────────────────────────────────────────────────────────────────


def stripes(count, generator):
    """Noisy images (count, 1, 8, 8) with stripes: down the image in one class, across in the other."""
    targets = (torch.rand(count, generator=generator) > 0.5).float()
    wave = torch.tensor([1.0, 1.0, -1.0, -1.0] * 2)
    stripes = torch.where(targets[:, None, None, None] > 0, wave[:, None], wave[None, :])
    signs = torch.randint(2, (count, 1, 1, 1), generator=generator) * 2 - 1
    return torch.randn(count, 1, 8, 8, generator=generator) + 0.8 * signs * stripes, targets[:, None]


def loss_after(section, late, seed):
    """Train a head at once, and a body by gradients that come some steps late; return the loss on new images."""
    generator = torch.Generator().manual_seed(seed)
    (inputs, targets), new = stripes(600, generator), stripes(300, generator)
    torch.manual_seed(seed)
    body = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 16), nn.ReLU(),
    )  # fmt: skip
    head, loss = nn.Linear(16, 1), nn.functional.binary_cross_entropy_with_logits
    of_body = PartOptimizer(section, body.parameters())
    of_head = PartOptimizer(OptimizerSection(name="adamw", lr=3e-3), head.parameters())
    waiting = []
    for _ in range(100):
        rows = torch.randint(600, (32,), generator=generator)
        of_body.zero_grad()
        of_head.zero_grad()
        loss(head(body(inputs[rows])), targets[rows]).backward()
        of_head.step(START)
        waiting.append([parameter.grad for parameter in body.parameters()])
        if len(waiting) > late:
            for parameter, gradient in zip(body.parameters(), waiting.pop(0), strict=True):
                parameter.grad = gradient
            of_body.step(START)
    with torch.no_grad():
        return loss(head(body(new[0])), new[1]).item()


def test_muon_bears_gradients_that_come_late_better_than_adamw():
    """Each with a rate that suffices without delay. Nine steps: `split_u` at window 6, with three sites."""
    adamw, muon = OptimizerSection(name="adamw", lr=3e-3), OptimizerSection(name="muon", lr=1e-2)
    at_once, late = ([[loss_after(rule, late, seed) for seed in range(4)] for rule in (adamw, muon)] for late in (0, 9))
    assert max(at_once[0] + at_once[1]) < 0.15
    assert all(of_muon < of_adamw for of_adamw, of_muon in zip(*late, strict=True))
    assert sum(late[1]) < 0.7 * sum(late[0])
