"""fedavg_transfer (Zhang and Li, arXiv 2203.12803), stage 2: averaging (McMahan et al., AISTATS 2017).

Stage 1, training on public data, is `nightsplit pretrain`.
"""

from collections.abc import Sequence

import torch
from typing_extensions import override

from nightsplit.server_worker.aggregation import Aggregation
from nightsplit.server_worker.rounds.role import RoundServer
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.protocols.build import WholeModel
from nightsplit.shared.storage.checkpoint import Snapshot, flatten, under


class FedavgTransferServer(RoundServer):
    """Server role of fedavg_transfer: the next model is the last one plus the combined update.

    A stale update is scaled by 1 / sqrt(1 + staleness), as in FedBuff (Nguyen et al., AISTATS 2022); its weight stays
    the site's number of training samples.
    """

    def __init__(self, config: RunConfig, model: WholeModel) -> None:
        super().__init__(config, model)
        self._aggregation = Aggregation(config.round)

    @override
    def add(self, site: str, update: Sequence[torch.Tensor], staleness: int) -> None:
        if self.is_last:  # the final model exists already
            return
        if staleness:
            update = [values * (1 + staleness) ** -0.5 for values in update]
        self._aggregation.add(site, update, float(self.sequences[site].train))

    @override
    def combine(self) -> tuple[torch.Tensor, dict[str, float]]:
        vector, outliers = self.vector.clone(), self._aggregation.outliers()
        for number, change in enumerate(self._aggregation.result(), 1):
            vector[self.layout.slice(number)] += change
        self._aggregation.clear()
        return vector, outliers

    @override
    def snapshot(self, first_unconfirmed: int | None) -> Snapshot:
        base = super().snapshot(first_unconfirmed)
        return Snapshot({**base.tensors, **flatten("aggregation", self._aggregation.state())}, base.facts)

    @override
    def restore(self, snapshot: Snapshot) -> None:
        super().restore(snapshot)
        self._aggregation.restore(under("aggregation", snapshot.tensors))


ROLE = FedavgTransferServer
