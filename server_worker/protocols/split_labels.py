"""split_labels (Ha et al., IEEE Access 2021, doi 10.1109/ACCESS.2021.3108455): labels travel with the activations."""

from __future__ import annotations

from nightsplit.server_worker.stream.role import StreamServer
from nightsplit.shared.engine.effects import Effect
from nightsplit.shared.learning.seeds import seed_for
from nightsplit.shared.protocols.plan import Item, Step
from nightsplit.shared.wire.message import Kind, Message


class SplitLabelsServer(StreamServer):
    """Trains the top on each batch and returns the gradient at the cut."""

    def learn(self, site: str, q: int, item: Item, message: Message) -> list[Effect]:
        """See `StreamServer`."""
        smashed, targets = message.tensors["smashed"], message.tensors["targets"]
        seq = message.header.seq
        if item.step is Step.TRAIN:
            seed = seed_for(self.config.run.seed, "top", site, q)
            loss, gradient = self.top.learn(smashed, targets, seed)
            record = self.trained(site, q, item, loss)
            return [self.answer(site, seq, Kind.CUT_GRADIENT, {"gradient": gradient}), record]
        self.evaluation.add(site, item.step, self.top.predict(smashed), targets)
        return self.close_block(site, q, item, seq)

    def close_block(self, site: str, q: int, item: Item, seq: int) -> list[Effect]:
        """Judge the epoch behind the last block, then answer with the verdict."""
        effects: list[Effect] = []
        if self.sequences[site].plan.ends_block(q):
            effects = self.evaluated(item.epoch, self.evaluation.close(site, item.epoch))
        return [self.answer(site, seq, Kind.NOTED), *effects]


ROLE = SplitLabelsServer
