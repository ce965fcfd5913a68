"""A whole model at a site: one local training step after the other."""

from collections.abc import Mapping

import torch
from torch import nn

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.errors import RunError
from nightsplit.shared.learning.losses import loss_of
from nightsplit.shared.learning.optimizers import make_optimizer, optimizer_tensors, restore_optimizer
from nightsplit.shared.learning.seeds import seeded
from nightsplit.shared.models.layout import frozen_weights
from nightsplit.shared.storage.checkpoint import flatten, under

ROWS_AT_A_TIME = 256


class Trainer:
    """Trains the modules that are not frozen. The optimizer's memory stays at the site, from round to round.

    The model is moved to `device`; tensors go in and come out on the CPU.
    """

    def __init__(self, module: nn.Module, config: RunConfig, device: str) -> None:
        self.module = module.to(device)
        self.config = config
        self.device = device
        frozen = frozen_weights(module, config.round.freeze)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name not in frozen)
        self.trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.optimizer = make_optimizer(config.optimizer, self.trained)
        self._frozen = [module.get_submodule(name) for name in config.round.freeze]

    def step(self, inputs: torch.Tensor, targets: torch.Tensor, seed: int, rate: float) -> float:
        """Take one step of the optimizer; return the mean loss of the batch.

        Args:
            inputs: (batch, ...) float32.
            targets: as `loss_of` takes them.
            seed: of dropout.
            rate: factor of the learning rate.

        Raises:
            RunError: 603 the loss is not finite.
        """
        self.train_mode()
        with seeded(seed, self.device):
            loss = loss_of(self.config.task, self.module(inputs.to(self.device)), targets.to(self.device))
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.advance(rate)
        return self.finite(loss)

    def train_mode(self) -> None:
        """Training mode, but for what is frozen: its running statistics stay as they are."""
        self.module.train()
        for module in self._frozen:
            module.eval()

    def advance(self, rate: float) -> None:
        """Let the optimizer take the step that the gradients ask for."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.optimizer.lr * rate
        self.optimizer.step()

    def finite(self, loss: torch.Tensor) -> float:
        """The loss as a number; raises as `step`."""
        if not torch.isfinite(loss):
            raise diverged("the training loss is not finite")
        return loss.item()

    def measure_statistics(self, inputs: torch.Tensor) -> None:
        """Measure the running statistics of normalizations anew, on inputs (n, ...) float32, without labels.

        As re-estimation after a merge (Jordan et al., REPAIR, ICLR 2023): each is the mean over batches.
        """
        norms = [module for module in self.module.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        norms = [norm for norm in norms if norm.track_running_stats]
        if not norms:
            return
        kept = [norm.momentum for norm in norms]
        self.module.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        with torch.no_grad():
            for rows in torch.split(inputs, ROWS_AT_A_TIME):
                self.module(rows.to(self.device))
        for norm, momentum in zip(norms, kept, strict=True):
            norm.momentum = momentum

    def predict(self, inputs: torch.Tensor) -> torch.Tensor:
        """Outputs for inputs (n, ...) float32, in evaluation mode."""
        return outputs_of(self.module.eval(), inputs, self.device)

    def predict_with(self, weights: Mapping[str, torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
        """As `predict`, with these weights, which do not stay."""
        own = self.weights()
        self.load(weights)
        outputs = self.predict(inputs)
        self.load(own)
        return outputs

    def weights(self) -> dict[str, torch.Tensor]:
        """CPU copies of parameters and buffers."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.module.state_dict().items()}

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Go on with these weights; what they do not name stays."""
        self.module.load_state_dict(dict(weights), strict=False)

    def state(self) -> dict[str, torch.Tensor]:
        """Entries for a snapshot."""
        module, optimizer = self.module.state_dict(), optimizer_tensors(self.optimizer)
        return {**flatten("module", module), **flatten("optimizer", optimizer)}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Continue from `state`."""
        self.module.load_state_dict(under("module", tensors))
        restore_optimizer(self.optimizer, under("optimizer", tensors))


@torch.no_grad()
def outputs_of(module: nn.Module, inputs: torch.Tensor, device: str) -> torch.Tensor:
    """Outputs (n, ...), on the CPU, for inputs (n, ...), of which `device` holds a part at a time."""
    return torch.cat([module(rows.to(device)).cpu() for rows in torch.split(inputs, ROWS_AT_A_TIME)])


def diverged(what: str) -> RunError:
    """The error of a training that leads nowhere."""
    return RunError(603, f"{what}.", "lower optimizer.lr in a new run, or check the data.")
