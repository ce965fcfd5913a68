"""Gradient inversion (Geiping et al., "Inverting Gradients", NeurIPS 2020), for segmentation models.

An image is sought whose gradient points the same way as the one that a site sent: the cosine distance of the two,
plus total variation, which prefers smooth images, is minimised with Adam on the signs of the image's gradient.
The attacker is given what he could not have in a hospital (the mask, where the image is not empty, the mean
image of others like it, and a gradient of one image alone), so that what he fails at, a real one fails at.

An attack says something about the data only if it found an image that explains the gradient. Otherwise it says
something about the attacker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from nightsplit.shared.config.run import TaskSection
from nightsplit.shared.learning.losses import loss_of

MATCHED = 0.05
"""Cosine distance below which an image explains a gradient."""
SETTLED = 0.01
"""Share of the whole fall of the distance that the last tenth of the iterations may still bring."""


@dataclass(frozen=True)
class Attacker:
    """Budget of an attack.

    Attributes:
        iterations: at most; the step size falls to zero over them, as a cosine.
        lr: first step of a pixel, on a scale of 0 to 1.
        variation: weight of total variation against cosine distance.
    """

    iterations: int = 1500
    lr: float = 0.02
    variation: float = 1e-2


@dataclass(frozen=True)
class Inversion:
    """Result of an attack.

    Attributes:
        image: (h, w) float32 in [0, 1].
        distance: cosine distance of its gradient and the given one, mean over the parameters.
        first_distance: likewise, of the image that the attack began with.
        settled: the last tenth of the iterations brought less than 1 % of the whole fall of the distance.
    """

    image: torch.Tensor
    distance: float
    first_distance: float
    settled: bool

    @property
    def matched(self) -> bool:
        """True if the image explains the gradient."""
        return self.settled and self.distance < MATCHED


def invert(
    model: nn.Module, gradient: Sequence[torch.Tensor], mask: torch.Tensor,
    start: torch.Tensor, content: torch.Tensor, attacker: Attacker,
) -> Inversion:  # fmt: skip
    """Look for the image behind a gradient.

    Args:
        model: the victim, with the weights at which the gradient was taken. Its activations must be smooth:
            second derivatives of ReLU and maximum pooling tell the attack nothing.
        gradient: one tensor per parameter.
        mask: (h, w) float32 0/1, the image's target.
        start: (h, w) float32 in [0, 1].
        content: (h, w) bool: where the image may differ from 0.
        attacker: his budget.
    """
    parameters = list(model.parameters())
    given = [part.detach() for part in gradient]
    task = TaskSection(kind="segmentation")
    image = (start * content).clone().requires_grad_()
    optimizer = torch.optim.Adam([image], lr=attacker.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, attacker.iterations)
    distances = []
    for _ in range(attacker.iterations):
        loss = loss_of(task, model(image[None, None]), mask[None])
        made = torch.autograd.grad(loss, parameters, create_graph=True)
        distance = _distance(made, given)
        objective = distance + attacker.variation * _variation(image)
        (slope,) = torch.autograd.grad(objective, image)
        image.grad = slope.sign() * content
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            image.clamp_(0.0, 1.0)
        distances.append(distance.item())
    first, before, last = distances[0], distances[-1 - attacker.iterations // 10], distances[-1]
    return Inversion(image.detach(), last, first, abs(before - last) <= SETTLED * max(first - last, 0.0))


def _distance(made: Sequence[torch.Tensor], given: Sequence[torch.Tensor]) -> torch.Tensor:
    cosines = [torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) for a, b in zip(made, given, strict=True)]
    return 1 - torch.stack(cosines).mean()


def _variation(image: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of neighbours."""
    return (image[1:] - image[:-1]).abs().mean() + (image[:, 1:] - image[:, :-1]).abs().mean()
