"""split_labels (Ha et al., IEEE Access 2021, doi 10.1109/ACCESS.2021.3108455): labels travel with the activations."""

from nightsplit.shared.engine.effects import Send
from nightsplit.shared.protocols.plan import Item
from nightsplit.shared.wire.message import Kind, Message
from nightsplit.site_worker.stream.role import StreamSite


class SplitLabelsSite(StreamSite):
    """Sends activations with their targets, learns from the gradients that return."""

    def content(self, item: Item) -> Send:
        """See `StreamSite`."""
        return self.send(item, Kind.SMASHED, {"smashed": self.forward(item), "targets": self.batches.targets(item)})

    def take(self, item: Item, message: Message) -> None:
        """See `StreamSite`."""
        self.apply_gradient(item, message.tensors["gradient"])


ROLE = SplitLabelsSite
