"""data_vectors (Tian et al., arXiv 2408.13038): a hospital trains alone, reports what changed once, and judges sums."""

from collections.abc import Mapping

import torch

from nightsplit.shared.protocols.data_vectors import SCALES, encode_reports
from nightsplit.shared.protocols.rounds import bounded
from nightsplit.shared.storage.checkpoint import Snapshot
from nightsplit.site_worker.rounds.role import RoundSite


class DataVectorsSite(RoundSite):
    """One round. The final model is the sum at scale 1, the farewell the sum at the best scale."""

    _statistics: Mapping[str, torch.Tensor] = {}
    """Normalization statistics (scales, statistics), as the layout encodes them."""

    def judge_final(self) -> str:
        """See `RoundSite`: figures at every scale, each with statistics that are measured for it."""
        texts, statistics = [], []
        for scale in SCALES:
            self.trainer.load(self.layout.weights(self.published + scale * (self.base - self.published)))
            self.trainer.measure_statistics(self.batches.train.inputs)
            statistics.append(self.layout.vector(self.trainer.weights())[self.layout.statistics])
            texts.append(self.judge())
        if self.layout.statistics.any():
            self._statistics = {"statistics": bounded(torch.stack(statistics))}
        return encode_reports(texts)

    def candidates(self, version: int) -> int:
        """See `RoundSite`."""
        return len(SCALES)

    def report_tensors(self) -> Mapping[str, torch.Tensor]:
        """See `RoundSite`."""
        return self._statistics

    def model(self) -> dict[str, dict[str, torch.Tensor]]:
        """See `SiteRole`; statistics that stay local are measured for the merged model."""
        self.trainer.load(super().model()["model"])
        if not self.layout.buffers:
            self.trainer.measure_statistics(self.batches.train.inputs)
        return super().model()

    def snapshot(self, first_unconfirmed: int | None) -> Snapshot:
        """See `Role`."""
        base = super().snapshot(first_unconfirmed)
        return Snapshot({**base.tensors, **self._statistics}, base.facts)

    def restore(self, snapshot: Snapshot) -> None:
        """See `Role`."""
        super().restore(snapshot)
        self._statistics = {name: tensor for name, tensor in snapshot.tensors.items() if name == "statistics"}


ROLE = DataVectorsSite
