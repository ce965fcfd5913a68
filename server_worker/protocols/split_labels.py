"""split_labels (Ha et al., IEEE Access 2021, doi 10.1109/ACCESS.2021.3108455): labels travel with the activations."""

from typing_extensions import override

from nightsplit.server_worker.stream.role import StreamServer
from nightsplit.shared.engine.effects import Effect
from nightsplit.shared.learning.seeds import seed_for
from nightsplit.shared.protocols.plan import Purpose
from nightsplit.shared.protocols.stream import Slot
from nightsplit.shared.wire.message import Kind, Message


class SplitLabelsServer(StreamServer):
    """Server role of split_labels, which trains the top on each batch and returns the gradient at the cut."""

    @override
    def apply_item(self, site: str, slot: Slot, message: Message) -> list[Effect]:
        item = slot.item
        if item.purpose is Purpose.TRAIN:
            batch = self.bounds.scale(site, message.tensors)
            seed = seed_for(self.config.run.seed, "top", site, item.number)
            loss, gradient = self.top.train_step(
                batch["smashed"], batch["targets"], seed, self.progress_at(site, item), self.bounds.limit(site)
            )
            records = self.record_step(site, item, loss)
            return [self.answer(site, slot.seq, Kind.CUT_GRADIENT, {"gradient": gradient}), *records]
        outputs = self.top.predict(message.tensors["smashed"])
        self.evaluation.add(site, item.purpose, outputs, message.tensors["targets"])
        effects = self.close_block(site, item) if item.ends_block else []  # first: the answer has the result
        return [self.answer(site, slot.seq, Kind.NOTED), *effects]


ROLE = SplitLabelsServer
