"""Bounds on training: no message may leave weights that make further training impossible, or outweigh all others.

    absolute    finite, and below `NORM_MAX`: what is beyond is refused
    relative    an outlier, beyond `OUTLIER` times the median norm, is scaled down to the median norm

The relative bound is norm bounding (Sun et al., arXiv 1911.07963, section 4) with the median of the sites in place of a
fixed threshold. It needs a majority of honest sites, so it begins with three of them.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from nightsplit.shared.errors import Refused
from nightsplit.shared.storage.checkpoint import flatten, under

NORM_MAX = 1e15
"""Largest norm of a tensor of gradients, weights or predictions: squares and sums of its values, and an optimizer's
steps with them, are finite float32 numbers."""
MAJORITY = 3
"""Fewest values with a majority that outvotes one of them."""
OUTLIER = 4.0
"""Multiple of the median norm beyond which a norm is an outlier; honest gradients of small batches stay within it."""
WRECK = 100.0
"""Likewise for what a site gets from its server, to which it has no second opinion than its own past."""
RECENT = 9
"""Number of a sender's latest norms whose median stands for it."""

Limit = Callable[[float], float]
"""Function that returns the factor by which gradients of a norm are scaled before they are applied."""


def unlimited(norm: float) -> float:
    """Return 1.0, as a `Limit`: gradients are applied as they are."""
    return 1.0


def is_bounded(*tensors: torch.Tensor) -> bool:
    """Return whether no tensor holds NaN or has a norm beyond `NORM_MAX`; always True for integers."""
    norms = [torch.linalg.vector_norm(tensor.detach()).float() for tensor in tensors if tensor.is_floating_point()]
    return not norms or bool((torch.stack(norms) <= NORM_MAX).all())  # one wait for a GPU, not one per tensor


def check_bounded(what: str, *tensors: torch.Tensor) -> None:
    """Raise Refused 312 unless the tensors are bounded, before any training with them."""
    if not is_bounded(*tensors):
        sentence = f"{what} of this batch are not finite, or beyond {NORM_MAX:g}."
        raise Refused(312, sentence, "lower optimizer.lr, or check the site's data.")


def check_step(module: nn.Module, *values: torch.Tensor) -> None:
    """Check all values of a training step: `values`, gradients, running statistics; Refused 312 for bad ones."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    check_bounded("loss, gradients or running statistics", *values, *gradients, *module.buffers())


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Restore a module's buffers, such as running statistics, if the body raises Refused."""
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    try:
        yield
    except Refused:
        module.load_state_dict(before, strict=False)
        raise


def norm_of(tensors: Sequence[torch.Tensor]) -> float:
    """Return the L2 norm of several tensors together, which is finite if they are."""
    norms = [torch.linalg.vector_norm(tensor.detach()).double() for tensor in tensors]
    norm: float = torch.linalg.vector_norm(torch.stack(norms)).item() if norms else 0.0
    if norm < math.inf:
        return norm
    # Squares of large float32 values are too large for float32; in float64 the norm takes twenty times as long.
    return float(torch.stack([torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]).norm())


def limit_gradients(parameters: Iterable[nn.Parameter], limit: Limit) -> None:
    """Scale all gradients by the factor of their norm."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    factor = limit(norm_of(gradients))
    if factor < 1.0:
        for gradient in gradients:
            gradient.mul_(factor)


def reference(norms: Collection[float]) -> float | None:
    """Return the median norm; None without a majority."""
    return statistics.median(norms) if len(norms) >= MAJORITY else None


def factor_for(norm: float, reference: float | None, outlier: float = OUTLIER) -> float:
    """Return the factor that gives an outlier the reference's norm; 1.0 for others, or without a reference."""
    return 1.0 if reference is None or norm <= outlier * reference else reference / norm


def capped(weights: Mapping[str, float]) -> dict[str, float]:
    """Return the weights, each at most their median, since a site's number of samples is a claim; or two unchanged."""
    median = reference(weights.values())
    return {name: weight if median is None else min(weight, median) for name, weight in weights.items()}


class RunningBound:
    """Bound on the norms of a stream of values from several senders.

    The reference is the median over the senders of the median of each one's `RECENT` latest norms, before they were
    scaled. Until a majority has sent, a sender is compared with its own past, and before it has one, with `first`.

    Args:
        senders: all who may send; of two of them none is bounded.
        first: first reference; None for none.
        outlier: multiple of the reference beyond which a norm is an outlier.
    """

    def __init__(self, senders: Sequence[str], first: float | None = None, outlier: float = OUTLIER) -> None:
        self._recent: dict[str, deque[float]] = {sender: deque(maxlen=RECENT) for sender in senders}
        self._first, self._outlier = first, outlier

    def factor(self, sender: str, norm: float) -> float:
        """Return the factor for the next value of a sender, 1.0 unless it is an outlier."""
        return factor_for(norm, self.reference(sender), self._outlier)

    def remember(self, sender: str, norm: float) -> None:
        """Add the norm of a sender's value, which was applied."""
        self._recent[sender].append(norm)

    def limit(self, sender: str, norm: float) -> float:
        """Return the factor for a sender's next value, and remember its norm; a `Limit` of gradients."""
        factor = self.factor(sender, norm)
        self.remember(sender, norm)
        return factor

    def reference(self, sender: str) -> float | None:
        """Return what a sender's next value is compared with; None if it is not bounded."""
        if len(self._recent) == MAJORITY - 1:
            return None
        medians = [statistics.median(recent) for recent in self._recent.values() if recent]
        if len(medians) >= MAJORITY:
            return statistics.median(medians)
        own = self._recent[sender]
        return statistics.median(own) if len(own) == RECENT else self._first

    def state(self) -> dict[str, torch.Tensor]:
        """Return the tensors of a snapshot."""
        return {sender: torch.tensor(recent, dtype=torch.float64) for sender, recent in self._recent.items() if recent}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Continue from `state`."""
        for sender, recent in self._recent.items():
            recent.clear()
            if sender in tensors:
                recent.extend(tensors[sender].tolist())


class LossBound:
    """Bound on the weight of a sender whose labels contradict those of the others, by the losses of its batches.

    A sender's loss is that of the median of its `RECENT` latest batches, as a multiple of the reference of its moment
    (`RunningBound`) and of chance, the loss of a model that knows nothing. It is an outlier if it is one among the
    senders and worse than chance: a hard batch is none, nor are hard patients, from whom the model learns something.
    """

    def __init__(self, senders: Sequence[str]) -> None:
        self._losses = RunningBound(senders)
        self._usual: dict[str, deque[float]] = {sender: deque(maxlen=RECENT) for sender in senders}
        """Latest losses of each sender as multiples of the reference."""
        self._chance: dict[str, deque[float]] = {sender: deque(maxlen=RECENT) for sender in senders}
        """Likewise, of chance."""

    def factor(self, sender: str) -> float:
        """Return the factor for the gradients of a sender's next batch, 1.0 unless its losses are outliers."""
        usual, chance = self._usual[sender], self._chance[sender]
        is_worse = len(usual) == RECENT and statistics.median(chance) > 1.0
        return factor_for(statistics.median(usual), 1.0) if is_worse else 1.0

    def remember(self, sender: str, loss: float, chance: float) -> None:
        """Add the loss of a sender's batch, which was applied, and the loss by chance there."""
        if usual := self._losses.reference(sender):
            self._usual[sender].append(loss / usual)
            self._chance[sender].append(loss / chance if chance else 0.0)
        self._losses.remember(sender, loss)

    def state(self) -> dict[str, torch.Tensor]:
        """Return the tensors of a snapshot."""
        pairs = {sender: [list(self._usual[sender]), list(self._chance[sender])] for sender in self._usual}
        of_each = {sender: torch.tensor(pair, dtype=torch.float64) for sender, pair in pairs.items()}
        return {**flatten("losses", self._losses.state()), **flatten("multiples", of_each)}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Continue from `state`."""
        self._losses.restore(under("losses", tensors))
        multiples = under("multiples", tensors)
        for sender in self._usual:
            usual, chance = multiples.get(sender, torch.empty(2, 0)).tolist()
            self._usual[sender] = deque(usual, maxlen=RECENT)
            self._chance[sender] = deque(chance, maxlen=RECENT)
