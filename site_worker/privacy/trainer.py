"""DP-SGD at a site: clip each record's gradient, add noise to the sum (Abadi et al., CCS 2016)."""

import hashlib

import torch
from torch import nn
from torch.func import vmap
from typing_extensions import override

from nightsplit.shared.config.run import PrivacySection, RunConfig
from nightsplit.shared.errors import RunError
from nightsplit.shared.learning.losses import loss_of
from nightsplit.shared.learning.optimizers import Progress
from nightsplit.shared.learning.seeds import Seed, seeded
from nightsplit.site_worker.privacy.hooks import PerSampleModule, has_rule
from nightsplit.site_worker.privacy.secret import Secret
from nightsplit.site_worker.rounds.trainer import Trainer


class PrivateTrainer(Trainer):
    """Trainer with noise, for the batches of `PrivateBatches`.

    Gradients of single records come from Opacus' hooks (Yousefpour et al., arXiv 2109.12298). The hooks keep
    the inputs of each layer on a stack, so that two forwards before a backward would silently give wrong gradients:
    `gradients` always does one forward and one backward.

    Args:
        privacy: clipping norm, and whether the noise is from the secure stream.
        secret: secret of this run.
        sigma: standard deviation of the noise, in units of the clipping norm.
        batch: expected number of records in a batch: rate times records. Sums are divided by it, since the actual
            number is private.

    Raises:
        RunError: 610 the model cannot be trained with differential privacy.
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
            self._hooked = PerSampleModule(self.module)
        except NotImplementedError as error:
            reason = " ".join(str(error).split())[:200]
            raise RunError(610, f"{reason}.", "use layers without buffers and without recurrence.") from None

    @override
    def step(self, inputs: torch.Tensor, targets: torch.Tensor, seed: Seed, progress: Progress) -> float:
        # The step of an empty batch is noise only, its loss is 0. The loss must stay at the site: it has no noise.
        loss, total = 0.0, torch.zeros(sum(parameter.numel() for parameter in self.trainable))
        if len(inputs):
            loss, gradients = self.gradients(inputs, targets, seed)
            total = self._clipped_sum(gradients).cpu()
        noisy = (self._with_noise(total, seed) / self._batch).to(self.device)
        parts = torch.split(noisy, [parameter.numel() for parameter in self.trainable])
        for parameter, part in zip(self.trainable, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        self.optimizer.step(progress)
        return loss

    def gradients(self, inputs: torch.Tensor, targets: torch.Tensor, seed: Seed) -> tuple[float, list[torch.Tensor]]:
        """Return the mean loss and the gradients of single records, (batch, *shape) for each trainable parameter.

        The loss of a record is `loss_of` for a batch of one. So a Dice loss, which is not a sum over a batch, is
        computed for each record. Raises as `step`.
        """
        self.train_mode()
        leaf = inputs.to(self.device).detach().requires_grad_()
        with seeded(seed, self.device):
            outputs = self._hooked(leaf)
        loss_of_one = vmap(lambda output, target: loss_of(self.config.task, output[None], target[None]))
        losses = loss_of_one(outputs, targets.to(self.device))
        # With respect to the inputs only: the sums over the batch, which autograd would put into .grad, are not needed.
        torch.autograd.backward(losses.sum(), inputs=[leaf])
        gradients: list[torch.Tensor] = [parameter.grad_sample for parameter in self.trainable]  # type: ignore[attr-defined]
        self._hooked.zero_grad()
        return self.to_number(losses.mean()), gradients

    def _clipped_sum(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        rows = [gradient.flatten(1) for gradient in gradients]
        norms = torch.stack([row.norm(dim=1) for row in rows]).norm(dim=0)
        factors = (self._privacy.clip / (norms + 1e-6)).clamp(max=1.0)
        return torch.cat([factors @ row for row in rows])

    def _with_noise(self, total: torch.Tensor, seed: Seed) -> torch.Tensor:
        """Add N(0, (sigma clip)^2) to each coordinate of `total`, the sum for all trainable weights.

        The noise depends on the sum as well, as the nonce of a signature on its message (RFC 6979). Otherwise a replay
        with another sum, on another machine for example, would reveal the difference of both sums without noise.
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
            layer = f"{name} is {type(module).__name__}, which"
            if not has_rule(module):
                remedy = "use convolutions and linear layers, or freeze that module."
                raise RunError(610, f"{layer} has no rule for gradients of single records.", remedy)
            if _mixes_records(module):
                remedy = "use GroupNorm in its place, or freeze that module."
                raise RunError(610, f"{layer} mixes the records of a batch.", remedy)


def _mixes_records(module: nn.Module) -> bool:
    """Return whether a layer computes statistics over a batch, or keeps running statistics."""
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return module.track_running_stats
    return isinstance(module, nn.modules.batchnorm._BatchNorm)
