"""split_labels (Ha et al., IEEE Access 2021, doi 10.1109/ACCESS.2021.3108455): labels travel with the activations."""

from typing_extensions import override

from nightsplit.shared.engine.effects import Send
from nightsplit.shared.protocols.plan import Item
from nightsplit.shared.protocols.stream import Slot
from nightsplit.shared.wire.message import Kind, Message
from nightsplit.site_worker.stream.blocks import BlockSite
from nightsplit.site_worker.stream.role import StreamSite


class SplitLabelsSite(StreamSite):
    """Role that sends activations with their targets, and trains with the gradients of the server."""

    @override
    def first_half(self, slot: Slot) -> Send:
        tensors = {"smashed": self.forward(slot.item), "targets": self.batches.targets(slot.item)}
        return self.message_at(slot, Kind.SMASHED, tensors)

    @override
    def apply_answer(self, item: Item, message: Message) -> None:
        self.apply_gradient(item, message.tensors["gradient"])


class SplitLabelsTargets(BlockSite, SplitLabelsSite):
    """Role that sends activations with their targets, and fits its layers to displacements."""


ROLE = SplitLabelsSite
TARGETS_ROLE = SplitLabelsTargets
