"""fedavg_transfer (Zhang and Li, arXiv 2203.12803), stage 2: averaging (McMahan et al., AISTATS 2017)."""

from collections.abc import Sequence

import torch

from nightsplit.server_worker.rounds.aggregation import make_aggregation
from nightsplit.server_worker.rounds.role import RoundServer
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.protocols.build import WholeModel
from nightsplit.shared.storage.checkpoint import Snapshot, flatten, under


class FedavgTransferServer(RoundServer):
    """The next model is the last one plus the combined update.

    An update counts 1 / sqrt(1 + staleness), as in FedBuff.
    """

    def __init__(self, config: RunConfig, model: WholeModel) -> None:
        super().__init__(config, model)
        self._aggregation = make_aggregation(config.round)

    def add(self, site: str, update: Sequence[torch.Tensor], staleness: int) -> None:
        """See `RoundServer`; what comes behind the last round is too late for any."""
        if self.is_last:
            return
        if staleness:
            update = [values * (1 + staleness) ** -0.5 for values in update]
        self._aggregation.add(f"{site}/{self.applied[site]}", update, float(self.sequences[site].train))

    def combine(self) -> torch.Tensor:
        """See `RoundServer`."""
        vector = self.vector.clone()
        for number, change in enumerate(self._aggregation.result(), 1):
            vector[self.layout.slice(number)] += change
        self._aggregation.clear()
        return vector

    def snapshot(self, first_unconfirmed: int | None) -> Snapshot:
        """See `Role`."""
        base = super().snapshot(first_unconfirmed)
        return Snapshot({**base.tensors, **flatten("aggregation", self._aggregation.state())}, base.facts)

    def restore(self, snapshot: Snapshot) -> None:
        """See `Role`."""
        super().restore(snapshot)
        self._aggregation.restore(under("aggregation", snapshot.tensors))


ROLE = FedavgTransferServer
