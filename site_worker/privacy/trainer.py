"""DP-SGD at a site: clip each record's gradient, add noise to the sum (Abadi et al., CCS 2016)."""

import hashlib

import torch
from torch import nn
from torch.func import vmap

from nightsplit.shared.config.run import PrivacySection, RunConfig
from nightsplit.shared.errors import RunError
from nightsplit.shared.learning.losses import loss_of
from nightsplit.shared.learning.seeds import seeded
from nightsplit.site_worker.privacy.hooks import Hooked, has_rule
from nightsplit.site_worker.privacy.secret import Secret
from nightsplit.site_worker.rounds.trainer import Trainer


class PrivateTrainer(Trainer):
    """Trains with noise, on batches that `PrivateBatches` has sampled.

    Gradients of single records come from Opacus' hooks (Yousefpour et al., arXiv 2109.12298). The hooks keep
    the inputs of each layer on a stack, so that two forwards before a backward would give wrong gradients
    without a word: `gradients` is one forward and one backward, always.

    Args:
        privacy: clipping norm and kind of stream.
        secret: of this run.
        sigma: standard deviation of the noise, in units of the clipping norm.
        batch: expected number of records in a batch: rate times records. The divisor, since the number that
            came is private.

    Raises:
        RunError: 610 the model cannot be trained like this.
    """

    def __init__(
        self, module: nn.Module, config: RunConfig, device: str,
        privacy: PrivacySection, secret: Secret, sigma: float, batch: float,
    ) -> None:  # fmt: skip
        super().__init__(module, config, device)
        self._privacy = privacy
        self._secret = secret
        self._sigma = sigma
        self._batch = batch
        self._check_layers()
        try:
            self._hooked = Hooked(self.module)
        except NotImplementedError as error:
            what = " ".join(str(error).split())[:200]
            raise RunError(610, f"{what}.", "use layers without buffers and without recurrence.") from None

    def step(self, inputs: torch.Tensor, targets: torch.Tensor, seed: int, rate: float) -> float:
        """Take one step with noise; see `Trainer.step`. The batch may be empty: then the step is noise alone.

        The mean loss that it returns, 0 of an empty batch, is for the site's eyes: no noise hides it.
        """
        loss, total = 0.0, torch.zeros(sum(parameter.numel() for parameter in self.trained))
        if len(inputs):
            loss, gradients = self.gradients(inputs, targets, seed)
            total = self._clipped_sum(gradients).cpu()
        noisy = (self._with_noise(total, seed) / self._batch).to(self.device)
        parts = torch.split(noisy, [parameter.numel() for parameter in self.trained])
        for parameter, part in zip(self.trained, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        self.advance(rate)
        return loss

    def gradients(self, inputs: torch.Tensor, targets: torch.Tensor, seed: int) -> tuple[float, list[torch.Tensor]]:
        """Mean loss, and the gradients of single records: (batch, *shape) of each trained parameter; raises as `step`.

        The loss of a record is `loss_of` a batch of one. So a Dice loss, which is no sum over a batch, is
        taken for each record alone.
        """
        self.train_mode()
        leaf = inputs.to(self.device).detach().requires_grad_()
        with seeded(seed, self.device):
            outputs = self._hooked(leaf)
        loss_of_one = vmap(lambda output, target: loss_of(self.config.task, output[None], target[None]))
        losses = loss_of_one(outputs, targets.to(self.device))
        # Down to the inputs alone: the sums over the batch, which autograd would put into .grad, are not needed.
        torch.autograd.backward(losses.sum(), inputs=[leaf])
        gradients: list[torch.Tensor] = [parameter.grad_sample for parameter in self.trained]  # type: ignore[attr-defined]
        self._hooked.zero_grad()
        return self.finite(losses.mean()), gradients

    def _clipped_sum(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        rows = [gradient.flatten(1) for gradient in gradients]
        norms = torch.stack([row.norm(dim=1) for row in rows]).norm(dim=0)
        factors = (self._privacy.clip / (norms + 1e-6)).clamp(max=1.0)
        return torch.cat([factors @ row for row in rows])

    def _with_noise(self, total: torch.Tensor, seed: int) -> torch.Tensor:
        """`total` (all trained weights) with N(0, (sigma clip)^2) on each coordinate.

        The noise depends on the sum as well, as a signature's nonce does on its message (RFC 6979). A replay
        that came out otherwise, on another machine say, would else show the difference of both sums bare.
        """
        if self._sigma == 0:
            return total
        digest = hashlib.sha256(total.numpy().tobytes()).digest()
        normals = self._secret.derive("noise", seed, digest).normals(len(total), secure=self._privacy.secure)
        return total + self._sigma * self._privacy.clip * torch.from_numpy(normals)

    def _check_layers(self) -> None:
        frozen = {id(part) for module in self._frozen for part in module.modules()}
        for name, module in self.module.named_modules():
            if id(module) in frozen:
                continue
            what = f"{name} is {type(module).__name__}, which"
            if not has_rule(module):
                remedy = "use convolutions and linear layers, or freeze that module."
                raise RunError(610, f"{what} has no rule for gradients of single records.", remedy)
            if _mixes_records(module):
                remedy = "use GroupNorm in its place, or freeze that module."
                raise RunError(610, f"{what} mixes the records of a batch.", remedy)


def _mixes_records(module: nn.Module) -> bool:
    """Whether it takes statistics over a batch, or keeps running ones."""
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return module.track_running_stats
    return isinstance(module, nn.modules.batchnorm._BatchNorm)
