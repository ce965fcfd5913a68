"""Local training of a whole model at a site."""

from collections.abc import Mapping

import torch
from msgspec.structs import replace
from torch import nn

from nightsplit.shared.config.optimizer import Schedule
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.errors import RunError
from nightsplit.shared.learning.losses import loss_of
from nightsplit.shared.learning.optimizers import PartOptimizer, Progress
from nightsplit.shared.learning.seeds import Seed, seeded
from nightsplit.shared.models.layout import frozen_weights
from nightsplit.shared.storage.checkpoint import flatten, under

INFERENCE_BATCH_SIZE = 256


class Trainer:
    """Trainer of the modules that are not frozen. The optimizer's state stays at the site between rounds.

    The model is moved to `device`; arguments and results are on the CPU.
    """

    def __init__(self, module: nn.Module, config: RunConfig, device: str) -> None:
        self.module = module.to(device)
        self.config = config
        self.device = device
        frozen = frozen_weights(module, config.round.freeze)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name not in frozen)
        self.trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        schedule: Schedule = "cosine" if config.round.decay == "cosine" else "constant"
        self.optimizer = PartOptimizer(replace(config.optimizer, schedule=schedule), self.trainable)
        self._frozen = [module.get_submodule(name) for name in config.round.freeze]

    def step(self, inputs: torch.Tensor, targets: torch.Tensor, seed: Seed, progress: Progress) -> float:
        """Take one step of the optimizer; return the mean loss of the batch.

        Args:
            inputs: (batch, ...) float32.
            targets: as for `loss_of`.
            seed: seed of dropout.
            progress: of the site's training.

        Raises:
            RunError: 603 the loss is not finite.
        """
        self.train_mode()
        with seeded(seed, self.device):
            loss = loss_of(self.config.task, self.module(inputs.to(self.device)), targets.to(self.device))
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step(progress)
        return self.to_number(loss)

    def train_mode(self) -> None:
        """Set training mode, except for frozen modules, so that their running statistics do not change."""
        self.module.train()
        for module in self._frozen:
            module.eval()

    def to_number(self, loss: torch.Tensor) -> float:
        """Return the loss as a number; raises as `step`."""
        if not torch.isfinite(loss):
            raise divergence_error("the training loss is not finite")
        return loss.item()

    def measure_statistics(self, inputs: torch.Tensor) -> None:
        """Estimate the running statistics of normalization layers again, on inputs (n, ...) float32.

        Each is the mean over batches, as after a merge in REPAIR (Jordan et al., ICLR 2023).
        """
        norms = [module for module in self.module.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        norms = [norm for norm in norms if norm.track_running_stats]
        if not norms:
            return
        momenta = [norm.momentum for norm in norms]
        self.module.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        with torch.no_grad():
            for rows in torch.split(inputs, INFERENCE_BATCH_SIZE):
                self.module(rows.to(self.device))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum

    def predict(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the outputs for inputs (n, ...) float32, in evaluation mode."""
        return compute_outputs(self.module.eval(), inputs, self.device)

    def predict_with(self, weights: Mapping[str, torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
        """Predict with other weights, and restore the present ones."""
        own = self.weights()
        self.load(weights)
        outputs = self.predict(inputs)
        self.load(own)
        return outputs

    def weights(self) -> dict[str, torch.Tensor]:
        """Return copies of parameters and buffers, on the CPU."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.module.state_dict().items()}

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Load these weights; others stay as they are."""
        self.module.load_state_dict(dict(weights), strict=False)

    def state(self) -> dict[str, torch.Tensor]:
        """Return the entries for a snapshot."""
        return {**flatten("module", self.module.state_dict()), **flatten("optimizer", self.optimizer.state())}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Continue from `state`."""
        self.module.load_state_dict(under("module", tensors))
        self.optimizer.restore(under("optimizer", tensors))


@torch.no_grad()
def compute_outputs(module: nn.Module, inputs: torch.Tensor, device: str) -> torch.Tensor:
    """Return the outputs (n, ...), on the CPU, for inputs (n, ...), which are moved to `device` in batches."""
    return torch.cat([module(rows.to(device)).cpu() for rows in torch.split(inputs, INFERENCE_BATCH_SIZE)])


def divergence_error(reason: str) -> RunError:
    """Return error 603 of a training that diverged."""
    return RunError(603, f"{reason}.", "lower optimizer.lr in a new run, or check the data.")
