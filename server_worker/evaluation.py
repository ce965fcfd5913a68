"""Evaluation of the candidates for the best model on the held-out patients of all sites, with early stopping.

A candidate has a number: an epoch of a stream, the version of a model in rounds, an index into the scales of
data_vectors. Its evaluation is complete when every active site has evaluated it. The best one has the best headline
figure on the validation patients of all sites (`nightsplit.shared.learning.metrics.score`); test figures are only
reported, never used to choose.
"""

from collections.abc import Mapping
from typing import Any

import torch

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.learning.metrics import measure, overall, score, typical
from nightsplit.shared.protocols.plan import Purpose
from nightsplit.shared.protocols.report import PARTS, SiteMetrics


class Evaluation:
    """Evaluations of all sites, and the best candidate by them.

    Attributes:
        best: best candidate so far; 0 before the first was evaluated.
        evaluated: last candidate that was evaluated.
        history: one entry per evaluated candidate: its number as "epoch", metrics per site and overall.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._sites = set(config.run.sites)
        self._collected: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        """Outputs and targets of the batches of each open block, by "site/part"."""
        self._reported: dict[int, dict[str, SiteMetrics]] = {}
        """Metrics by site of each candidate that is not evaluated by all sites."""
        self._best_score: tuple[float, float] | None = None
        self.best = 0
        self.evaluated = 0
        self.history: list[dict[str, Any]] = []

    def add(self, site: str, part: Purpose, outputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Add predictions (batch, outputs) and targets (batch,) of one batch of a site's open block."""
        self._collected.setdefault(f"{site}/{part}", []).append((outputs, targets.clone()))

    def close(self, site: str, candidate: int) -> bool:
        """Measure a site's complete block; return whether that completes the candidate's evaluation."""
        metrics: SiteMetrics = {}
        for part in PARTS:
            batches = self._collected.pop(f"{site}/{part}", [])
            if batches:
                outputs, targets = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
                metrics[part] = measure(self._config.task, self._config.data, outputs, targets)
        return self.report(site, candidate, metrics)

    def report(self, site: str, candidate: int, metrics: SiteMetrics) -> bool:
        """Add a site's own figures for a candidate; return whether they complete its evaluation."""
        self._reported.setdefault(candidate, {})[site] = metrics
        return self._evaluate_if_complete(candidate)

    def exclude(self, site: str) -> list[int]:
        """Stop waiting for a site; return the candidates that this completes. Its reports stay."""
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
        self.evaluated = max(candidate, self.evaluated)
        # Without validation patients there is no score, and the last candidate is the best.
        part = Purpose.VALIDATION
        validation = typical([metrics[part] for metrics in sites.values() if part in metrics])
        new = score(self._config.task, validation) if validation["samples"] else None
        if self._best_score is None or (new is not None and new > self._best_score):
            self.best, self._best_score = candidate, new
        return True

    @property
    def exhausted(self) -> bool:
        """True after `patience` evaluations in a row without an improvement."""
        patience = self._config.run.patience
        later = [entry for entry in self.history if entry["epoch"] > self.best]
        return patience > 0 and len(later) >= patience

    def entry(self, candidate: int) -> dict[str, Any] | None:
        """Return the history's entry for a candidate."""
        return next((entry for entry in self.history if entry["epoch"] == candidate), None)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors of a snapshot."""
        entries = {}
        for key, batches in self._collected.items():
            entries[f"evaluation/{key}/outputs"] = torch.cat([outputs for outputs, _ in batches])
            entries[f"evaluation/{key}/targets"] = torch.cat([targets for _, targets in batches])
        return entries

    def facts(self) -> dict[str, Any]:
        """Return the facts of a snapshot."""
        return {
            "sites": sorted(self._sites),
            "reported": {str(candidate): dict(sites) for candidate, sites in self._reported.items()},
            "score": self._best_score, "best": self.best, "judged": self.evaluated,
            "history": list(self.history),
        }  # fmt: skip

    def restore(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Continue from `tensors` and `facts`."""
        self._sites = set(facts["sites"])
        self._reported = {int(candidate): sites for candidate, sites in facts["reported"].items()}
        self._best_score = tuple(facts["score"]) if facts["score"] else None
        self.best, self.evaluated = facts["best"], facts["judged"]
        self.history = facts["history"]
        self._collected = {}
        for name, tensor in tensors.items():
            if name.startswith("evaluation/") and name.endswith("/outputs"):
                key = name.removeprefix("evaluation/").removesuffix("/outputs")
                self._collected[key] = [(tensor, tensors[f"evaluation/{key}/targets"])]
