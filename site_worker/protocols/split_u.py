"""split_u, the U-shaped extension of Ha et al.: the last layers and the labels stay at the site."""

from collections.abc import Mapping
from typing import Self

import torch
from torch import nn

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.engine.effects import Send
from nightsplit.shared.learning.bounds import buffers_kept, check_bounded, check_step
from nightsplit.shared.learning.losses import loss_of
from nightsplit.shared.learning.metrics import measure
from nightsplit.shared.learning.optimizers import make_optimizer, optimizer_tensors, restore_optimizer
from nightsplit.shared.learning.seeds import seeded
from nightsplit.shared.protocols.build import SplitModel
from nightsplit.shared.protocols.plan import Item, Purpose
from nightsplit.shared.protocols.report import NO_FIGURES, encode_report
from nightsplit.shared.protocols.stream import Slot
from nightsplit.shared.storage.checkpoint import Snapshot, flatten, under
from nightsplit.shared.wire.message import Kind, Message
from nightsplit.shared.wire.schema import Payload
from nightsplit.site_worker.data.dataset import Splits
from nightsplit.site_worker.stream.batches import StreamBatches
from nightsplit.site_worker.stream.bottom import Bottom
from nightsplit.site_worker.stream.role import StreamSite


class SplitUSite(StreamSite):
    """Holds the bottom, the head and the labels; the head computes on `device`. Other arguments as of `StreamSite`."""

    def __init__(
        self,
        name: str,
        config: RunConfig,
        bottom: Bottom,
        batches: StreamBatches,
        contract: Mapping[Kind, Payload],
        incarnation: str,
        head: nn.Module,
        device: str,
    ) -> None:
        super().__init__(name, config, bottom, batches, contract, incarnation)
        self.head = head.to(device)
        self._device = device
        self._optimizer = make_optimizer(config.optimizer, head.parameters())
        self._gradients: dict[int, torch.Tensor] = {}
        """Gradients at the head's input, by item, until their message is confirmed."""
        self._reports: dict[int, str] = {}
        """The site's figures, by the last item of their block, until their message is confirmed."""
        self._outputs: dict[int, torch.Tensor] = {}
        """Predictions for the held-out samples of the open evaluation block, by item."""
        self._heads: dict[int, dict[str, torch.Tensor]] = {}
        """The head that each epoch was evaluated with, while that epoch may still be the best."""

    @classmethod
    def make(
        cls, name: str, config: RunConfig, model: SplitModel, splits: Splits, incarnation: str, device: str
    ) -> Self:
        """See `StreamSite`."""
        bottom, head = Bottom(model.parts.bottom, config.optimizer, device), model.parts.head
        assert head is not None
        return cls(name, config, bottom, StreamBatches(config, name, splits), model.contract, incarnation, head, device)

    def model(self) -> dict[str, dict[str, torch.Tensor]]:
        """See `SiteRole`."""
        return {**super().model(), "head": self._heads.get(self.best, self.head.state_dict())}

    def content(self, item: Item) -> Send:
        """See `StreamSite`."""
        return self.send(item, Kind.SMASHED, {"smashed": self.forward(item)})

    def second(self, item: Item) -> Send:
        """See `StreamSite`; where no head input could be used there is no gradient, and an empty report."""
        if item.number in self._gradients:
            return self.send(item, Kind.HEAD_GRADIENT, {"gradient": self._gradients[item.number]})
        return self.send(item, Kind.REPORT, {}, metrics=self._reports.get(item.number, NO_FIGURES))

    def take(self, item: Item, message: Message) -> None:
        """See `StreamSite`: the head's turn, or the gradient at the cut."""
        if message.header.kind is Kind.CUT_GRADIENT:
            self.apply_gradient(item, message.tensors["gradient"])
            return
        activations = message.tensors["activations"]
        if item.purpose is Purpose.TRAIN:
            self._gradients[item.number] = self._train_head(item, activations)
            return
        self.head.eval()
        with torch.no_grad():
            outputs = self.head(activations.to(self._device))
        check_bounded("outputs", outputs)
        self._outputs[item.number] = outputs.cpu()

    def count_answer(self, slot: Slot, judged: int) -> None:
        """See `StreamSite`; with the last head input of a block, usable or not, the site has its figures."""
        item = slot.item
        if item.ends_block and not slot.settles:
            self._reports[item.number] = self._judge()
            self._heads = {epoch: kept for epoch, kept in self._heads.items() if self.open_candidate(epoch)}
            self._heads[item.epoch] = {name: tensor.clone() for name, tensor in self.head.state_dict().items()}
        super().count_answer(slot, judged)

    def _train_head(self, item: Item, activations: torch.Tensor) -> torch.Tensor:
        """One step of the head: the gradient (batch, *head) at its input, finite; else 312, and nothing was changed."""
        inputs = activations.to(self._device, copy=True).requires_grad_()
        self.head.train()
        with buffers_kept(self.head):
            with seeded(self.batches.seed("head", item), self._device):
                loss = loss_of(self.config.task, self.head(inputs), self.batches.targets(item).to(self._device))
            self._optimizer.zero_grad()
            torch.autograd.backward(loss)
            assert inputs.grad is not None
            check_step(self.head, loss, inputs.grad)
        self._optimizer.step()
        return inputs.grad.cpu()

    def _judge(self) -> str:
        """The figures of the block that just ended, as JSON."""
        figures = {}
        evaluated = [self.batches.plan.item(q) for q in sorted(self._outputs)]
        for part in (Purpose.VALIDATION, Purpose.TEST):
            if items := [item for item in evaluated if item.purpose is part]:
                outputs = torch.cat([self._outputs[item.number] for item in items])
                targets = torch.cat([self.batches.targets(item) for item in items])
                figures[part.value] = measure(self.config.task, self.config.data, outputs, targets)
        self._outputs.clear()
        return encode_report(self.config.task, figures)

    def snapshot(self, first_unconfirmed: int | None) -> Snapshot:
        """See `Role`."""
        base = super().snapshot(first_unconfirmed)
        resume = base.facts["next"]
        for kept in (self._gradients, self._reports):
            for q in [q for q in kept if self.sequence.settles(q) < resume]:
                del kept[q]
        tensors = {**base.tensors, **flatten("gradients", self._gradients), **flatten("outputs", self._outputs)}
        tensors.update(flatten("head", self.head.state_dict()))
        tensors.update(flatten("head_optimizer", optimizer_tensors(self._optimizer)))
        for epoch, kept_head in self._heads.items():
            tensors.update(flatten(f"candidate_head/{epoch}", kept_head))
        return Snapshot(tensors, {**base.facts, "reports": {**self._reports}, "heads": list(self._heads)})

    def restore(self, snapshot: Snapshot) -> None:
        """See `Role`."""
        super().restore(snapshot)
        tensors = snapshot.tensors
        self.head.load_state_dict(under("head", tensors))
        restore_optimizer(self._optimizer, under("head_optimizer", tensors))
        self._gradients = {int(q): tensor for q, tensor in under("gradients", tensors).items()}
        self._outputs = {int(q): tensor for q, tensor in under("outputs", tensors).items()}
        self._reports = {int(q): text for q, text in snapshot.facts["reports"].items()}
        self._heads = {epoch: under(f"candidate_head/{epoch}", tensors) for epoch in snapshot.facts["heads"]}


ROLE = SplitUSite
