"""data_vectors (Tian et al., arXiv 2408.13038): models that hospitals trained apart become one by adding what changed.

    theta_mix = theta_pre + scale * sum of tau_j,   tau_j = theta_j - theta_pre

Every site reports its tau once, whenever it likes. Then each judges the sum at every scale on its own
held-out patients, with normalization statistics that it has measured anew for it, and the scale is the one
that is best for the validation patients of all.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nightsplit.server_worker.published_vectors import added, publish
from nightsplit.server_worker.rounds.role import RoundServer
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.engine.effects import Effect
from nightsplit.shared.errors import mismatch
from nightsplit.shared.protocols.build import WholeModel
from nightsplit.shared.protocols.data_vectors import SCALES, decode_reports
from nightsplit.shared.protocols.report import SiteMetrics, decode_report
from nightsplit.shared.protocols.rounds import bounded, check_size
from nightsplit.shared.storage.checkpoint import Snapshot, flatten, under
from nightsplit.shared.wire.message import Message


class DataVectorsServer(RoundServer):
    """Adds vectors. A candidate of the evaluation is one of `SCALES`, by its place there, from 1."""

    def __init__(self, config: RunConfig, model: WholeModel) -> None:
        super().__init__(config, model)
        self.vectors: dict[str, torch.Tensor] = {}
        """tau of each site that has reported, float32 (length,), to be published with the report."""
        self._sum = torch.zeros_like(self.vector)
        """Of the vectors that came in time."""
        self._statistics: dict[str, torch.Tensor] = {}
        """Statistics (scales, statistics) that each site has measured, encoded as `WeightLayout.vector` does."""

    @property
    def scale(self) -> float | None:
        """The one that was chosen; None before that."""
        return SCALES[self.evaluation.best - 1] if self.evaluation.best else None

    def add(self, site: str, update: Sequence[torch.Tensor], staleness: int) -> None:
        """See `RoundServer`: one vector per site, of which none is stale."""
        self.vectors[site] = torch.cat(list(update))

    def combine(self) -> torch.Tensor:
        """See `RoundServer`: at scale 1, from which every other follows."""
        if self.vectors:
            self._sum = added(self.vectors)
        return self.published + self._sum

    def take_final_figures(self, site: str, message: Message | None) -> list[Effect]:
        """See `RoundServer`: figures at every scale."""
        figures: list[SiteMetrics] = [{} for _ in SCALES]
        if message is not None:
            name, announced = message.header.message_id, self.announced(site)
            texts = decode_reports(str(message.scalars["metrics"]), name)
            figures = [decode_report(text, self.config.task, announced, name) for text in texts]
            if "statistics" in message.tensors:
                self._statistics[site] = self._checked(message)
        return [
            effect for place, metrics in enumerate(figures, 1) for effect in self.take_figures(site, place, metrics)
        ]

    def _checked(self, message: Message) -> torch.Tensor:
        """Statistics (scales, statistics) of which variances can be taken; Refused 307 where they are none."""
        statistics = message.tensors["statistics"]
        check_size(message, statistics)
        if (statistics[:, self.layout.second_moments[self.layout.statistics]] < 0).any():
            raise mismatch(f"{message.header.message_id} has variances below 0.", 307)
        return statistics.clone()

    def describe_candidate(self, candidate: int) -> list[Effect]:
        """See `ServerRole`."""
        effects = super().describe_candidate(candidate)
        if self.evaluation.best == candidate:
            self.best_weights = self.layout.weights(self.merged())
        return effects

    def merged(self) -> torch.Tensor:
        """theta_mix at the chosen scale, float32 (length,), with the pooled statistics of the sites."""
        assert self.scale is not None
        merged = self.published + self.scale * self._sum
        samples = {site: self.sequences[site].train for site in self.config.run.sites if site in self._statistics}
        if samples:
            place, everybody = self.evaluation.best - 1, sum(samples.values())
            pooled = torch.stack([n / everybody * self._statistics[site][place] for site, n in samples.items()])
            merged[self.layout.statistics] = pooled.sum(0)
        return bounded(merged)

    def outcome(self) -> dict[str, Any]:
        """See `ServerRole`."""
        return {"scale": self.scale}

    def publish(self, folder: Path) -> None:
        """See `ServerRole`: the vectors, so that hospitals can be added and taken out later."""
        publish(folder, self.layout, self.published, self.vectors, self.scale)

    def snapshot(self, first_unconfirmed: int | None) -> Snapshot:
        """See `Role`."""
        base = super().snapshot(first_unconfirmed)
        own = {**flatten("vectors", self.vectors), **flatten("statistics", self._statistics)}
        return Snapshot({**base.tensors, "sum": self._sum, **own}, base.facts)

    def restore(self, snapshot: Snapshot) -> None:
        """See `Role`."""
        super().restore(snapshot)
        self._sum = snapshot.tensors["sum"]
        self.vectors = under("vectors", snapshot.tensors)
        self._statistics = under("statistics", snapshot.tensors)


ROLE = DataVectorsServer
