"""data_vectors (Tian et al., arXiv 2408.13038): a site trains alone, sends one update, and evaluates merged updates."""

from collections.abc import Mapping

import torch
from typing_extensions import override

from nightsplit.shared.protocols.data_vectors import SCALES, encode_reports
from nightsplit.shared.protocols.rounds import bounded
from nightsplit.shared.storage.checkpoint import Snapshot
from nightsplit.site_worker.rounds.role import RoundSite


class DataVectorsSite(RoundSite):
    """Role of one round: the final model is the sum at scale 1, the farewell the sum at the best scale."""

    _statistics: Mapping[str, torch.Tensor] = {}
    """Normalization statistics (scales, statistics) in the layout's encoding."""

    @override
    def evaluate_final(self) -> str:
        texts, statistics = [], []
        for scale in SCALES:  # each with statistics of its own
            self.trainer.load(self.layout.weights(self.published + scale * (self.base - self.published)))
            self.trainer.measure_statistics(self.batches.train.inputs)
            statistics.append(self.layout.vector(self.trainer.weights())[self.layout.statistics])
            texts.append(self.evaluate())
        if self.layout.statistics.any():
            self._statistics = {"statistics": bounded(torch.stack(statistics))}
        return encode_reports(texts)

    @override
    def candidates(self, version: int) -> int:
        return len(SCALES)

    @override
    def report_tensors(self) -> Mapping[str, torch.Tensor]:
        return self._statistics

    @override
    def model(self) -> dict[str, dict[str, torch.Tensor]]:
        # Statistics that are not exchanged are measured for the merged model.
        self.trainer.load(super().model()["model"])
        if not self.layout.buffers:
            self.trainer.measure_statistics(self.batches.train.inputs)
        return super().model()

    @override
    def snapshot(self, first_unconfirmed: int | None) -> Snapshot:
        base = super().snapshot(first_unconfirmed)
        return Snapshot({**base.tensors, **self._statistics}, base.facts)

    @override
    def restore(self, snapshot: Snapshot) -> None:
        super().restore(snapshot)
        self._statistics = {name: tensor for name, tensor in snapshot.tensors.items() if name == "statistics"}


ROLE = DataVectorsSite
