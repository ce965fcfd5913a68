"""What held-out patients of all sites say about the candidates for the best model, and when to stop.

A candidate has a number: an epoch of a stream, the version of a model in rounds, a place among the scales of
data_vectors. It is judged when every site that takes part has evaluated it. The best one has the best headline figure
on the validation patients of all sites (`nightsplit.shared.learning.metrics.score`); test figures are only reported,
never used to choose.
"""

from collections.abc import Mapping
from typing import Any

import torch

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.learning.metrics import measure, overall, score
from nightsplit.shared.protocols.plan import Purpose
from nightsplit.shared.protocols.report import PARTS, SiteMetrics


class Evaluation:
    """Collects evaluations and remembers the best candidate.

    Attributes:
        best: best candidate so far; 0 before the first was judged.
        judged: last candidate that was judged.
        history: one entry per judged candidate: its number as "epoch", metrics per site and overall.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._sites = set(config.run.sites)
        self._collected: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._reported: dict[int, dict[str, SiteMetrics]] = {}
        self._best_score: tuple[float, float] | None = None
        self.best = 0
        self.judged = 0
        self.history: list[dict[str, Any]] = []

    def add(self, site: str, part: Purpose, outputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Predictions (batch, outputs) and targets (batch,) of one batch of a site's open block."""
        self._collected.setdefault(f"{site}/{part}", []).append((outputs, targets.clone()))

    def close(self, site: str, candidate: int) -> bool:
        """A site's block is complete; whether this was the last site, so that the candidate is judged."""
        metrics: SiteMetrics = {}
        for part in PARTS:
            batches = self._collected.pop(f"{site}/{part}", [])
            if batches:
                outputs, targets = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
                metrics[part] = measure(self._config.task, self._config.data, outputs, targets)
        return self.report(site, candidate, metrics)

    def report(self, site: str, candidate: int, metrics: SiteMetrics) -> bool:
        """A site's own figures for a candidate; whether it is judged with them."""
        self._reported.setdefault(candidate, {})[site] = metrics
        return self._evaluate_if_complete(candidate)

    def exclude(self, site: str) -> list[int]:
        """Wait for a site no more; the candidates that are judged thereby. What it has reported stays."""
        self._sites.discard(site)
        for part in PARTS:
            self._collected.pop(f"{site}/{part}", None)
        return [candidate for candidate in sorted(self._reported) if self._evaluate_if_complete(candidate)]

    def _evaluate_if_complete(self, candidate: int) -> bool:
        if not self._sites <= set(self._reported[candidate]):
            return False
        sites = self._reported.pop(candidate)
        total = {part: overall([metrics[part] for metrics in sites.values() if part in metrics]) for part in PARTS}
        self.history.append({"epoch": candidate, "sites": sites, "overall": total})
        self.judged = max(candidate, self.judged)
        # Without validation patients there is nothing to choose by: the last candidate stands.
        validation = total[Purpose.VALIDATION]
        reached = score(self._config.task, validation) if validation["samples"] else None
        if self._best_score is None or (reached is not None and reached > self._best_score):
            self.best, self._best_score = candidate, reached
        return True

    @property
    def exhausted(self) -> bool:
        """Whether `patience` evaluations in a row brought no improvement."""
        patience = self._config.run.patience
        since = [entry for entry in self.history if entry["epoch"] > self.best]
        return patience > 0 and len(since) >= patience

    def of(self, candidate: int) -> dict[str, Any] | None:
        """The history's entry for a candidate."""
        return next((entry for entry in self.history if entry["epoch"] == candidate), None)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Entries for a snapshot."""
        entries = {}
        for key, batches in self._collected.items():
            entries[f"evaluation/{key}/outputs"] = torch.cat([outputs for outputs, _ in batches])
            entries[f"evaluation/{key}/targets"] = torch.cat([targets for _, targets in batches])
        return entries

    def facts(self) -> dict[str, Any]:
        """Facts for a snapshot."""
        return {
            "sites": sorted(self._sites),
            "reported": {str(candidate): dict(sites) for candidate, sites in self._reported.items()},
            "score": self._best_score, "best": self.best, "judged": self.judged,
            "history": list(self.history),
        }  # fmt: skip

    def restore(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Continue from `tensors` and `facts`."""
        self._sites = set(facts["sites"])
        self._reported = {int(candidate): sites for candidate, sites in facts["reported"].items()}
        self._best_score = tuple(facts["score"]) if facts["score"] else None
        self.best, self.judged = facts["best"], facts["judged"]
        self.history = facts["history"]
        self._collected = {}
        for name, tensor in tensors.items():
            if name.startswith("evaluation/") and name.endswith("/outputs"):
                key = name.removeprefix("evaluation/").removesuffix("/outputs")
                self._collected[key] = [(tensor, tensors[f"evaluation/{key}/targets"])]
