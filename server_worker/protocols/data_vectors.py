"""data_vectors (Tian et al., arXiv 2408.13038): merges separately trained models by adding their changes.

    theta_mix = theta_pre + scale * sum of tau_j,   tau_j = theta_j - theta_pre

From three sites on, the sum is their number times the geometric median of the tau, so that none outweighs the others.

Every site reports its tau once, at any time. Then each site evaluates the sum at every scale on its own
held-out patients, with normalization statistics that it measures for that scale. The scale with the best
validation figure over all sites is chosen.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from nightsplit.server_worker.published_vectors import publish, sum_vectors
from nightsplit.server_worker.rounds.role import RoundServer
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.engine.effects import Effect
from nightsplit.shared.errors import mismatch
from nightsplit.shared.learning.bounds import capped
from nightsplit.shared.protocols.build import WholeModel
from nightsplit.shared.protocols.data_vectors import SCALES, decode_reports
from nightsplit.shared.protocols.report import SiteMetrics, decode_report
from nightsplit.shared.protocols.rounds import bounded, check_size
from nightsplit.shared.storage.checkpoint import Snapshot, flatten, under
from nightsplit.shared.wire.message import Message


class DataVectorsServer(RoundServer):
    """Server role of data_vectors. A candidate of the evaluation is an index into `SCALES`, from 1."""

    def __init__(self, config: RunConfig, model: WholeModel) -> None:
        super().__init__(config, model)
        self.vectors: dict[str, torch.Tensor] = {}
        """tau of each site that has reported, late ones included, float32 (length,); published with the report."""
        self._sum = torch.zeros_like(self.vector)
        """Sum of the tau that arrived before the round closed, of which the merged model consists."""
        self._statistics: dict[str, torch.Tensor] = {}
        """Normalization statistics by site, float32 (scales, statistics), encoded as in `WeightLayout.vector`."""

    @property
    def scale(self) -> float | None:
        """Chosen scale; None before the choice."""
        return SCALES[self.evaluation.best - 1] if self.evaluation.best else None

    @override
    def add(self, site: str, update: Sequence[torch.Tensor], staleness: int) -> None:
        self.vectors[site] = torch.cat(list(update))  # the site's only update, always from theta_pre: never stale

    @override
    def combine(self) -> tuple[torch.Tensor, dict[str, float]]:
        outliers: dict[str, float] = {}
        if self.vectors:  # there is none if every update was refused
            self._sum, outliers = sum_vectors(self.vectors)
        return self.published + self._sum, outliers  # at scale 1; sites compute the other scales from it

    @override
    def add_final_figures(self, site: str, message: Message | None) -> list[Effect]:
        figures: list[SiteMetrics] = [{} for _ in SCALES]
        if message is not None:
            name, counts = message.header.message_id, self.sample_counts(site)
            texts = decode_reports(str(message.scalars["metrics"]), name)
            figures = [decode_report(text, self.config.task, counts, name) for text in texts]
            if "statistics" in message.tensors:
                self._statistics[site] = self._read_statistics(message)
        effects: list[Effect] = []
        for candidate, metrics in enumerate(figures, 1):
            effects += self.add_figures(site, candidate, metrics)
        return effects

    def _read_statistics(self, message: Message) -> torch.Tensor:
        """Return the statistics (scales, statistics) of a message; Refused 307 if a second moment is negative."""
        statistics = message.tensors["statistics"]
        check_size(message, statistics)
        is_second_moment = self.layout.second_moments[self.layout.statistics]
        if (statistics[:, is_second_moment] < 0).any():
            raise mismatch(f"{message.header.message_id} has negative second moments.", 307)
        return statistics.clone()

    @override
    def describe_candidate(self, candidate: int) -> list[Effect]:
        effects = super().describe_candidate(candidate)
        if self.evaluation.best == candidate:
            self.best_weights = self.layout.weights(self.merged())
        return effects

    def merged(self) -> torch.Tensor:
        """Return theta_mix at the chosen scale, float32 (length,), with the pooled statistics of the sites."""
        assert self.scale is not None
        merged = self.published + self.scale * self._sum
        sites = [site for site in self.config.run.sites if site in self._statistics]
        samples = capped({site: self.sequences[site].train for site in sites})
        if samples:
            index, total = self.evaluation.best - 1, sum(samples.values())
            pooled = torch.stack([n / total * self._statistics[site][index] for site, n in samples.items()])
            merged[self.layout.statistics] = pooled.sum(0)
        return bounded(merged)

    @override
    def outcome(self) -> dict[str, Any]:
        return {"scale": self.scale}

    @override
    def publish(self, folder: Path) -> None:
        # The vectors, so that hospitals can be added and removed later.
        publish(folder, self.layout, self.published, self.vectors, self.scale)

    @override
    def snapshot(self, first_unconfirmed: int | None) -> Snapshot:
        base = super().snapshot(first_unconfirmed)
        own = {**flatten("vectors", self.vectors), **flatten("statistics", self._statistics)}
        return Snapshot({**base.tensors, "sum": self._sum, **own}, base.facts)

    @override
    def restore(self, snapshot: Snapshot) -> None:
        super().restore(snapshot)
        self._sum = snapshot.tensors["sum"]
        self.vectors = under("vectors", snapshot.tensors)
        self._statistics = under("statistics", snapshot.tensors)


ROLE = DataVectorsServer
