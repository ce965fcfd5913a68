"""What held-out patients of all sites say about the model, epoch by epoch, and when to stop.

An epoch is judged when every site that takes part has evaluated it. The best epoch is the one with the best headline
figure on the validation patients of all sites (`nightsplit.shared.learning.metrics.standing`); test figures are only
reported, never used to choose.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.learning.metrics import Metrics, measure, overall, standing
from nightsplit.shared.protocols.plan import Step

PARTS = (Step.VALIDATION, Step.TEST)
SiteMetrics = dict[str, Metrics]
"""Metrics by part: "validation", "test"."""


class Evaluation:
    """Collects evaluations and remembers the best epoch.

    Attributes:
        best: best epoch so far; 0 before the first was judged.
        judged: last epoch that was judged.
        history: one entry per judged epoch: epoch, metrics per site and overall.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._sites = set(config.run.sites)
        self._collected: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._reported: dict[int, dict[str, SiteMetrics]] = {}
        self._best_standing: tuple[float, float] | None = None
        self.best = 0
        self.judged = 0
        self.history: list[dict[str, Any]] = []

    def add(self, site: str, part: Step, outputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Predictions (batch, outputs) and targets (batch,) of one batch of a site's open block."""
        self._collected.setdefault(f"{site}/{part}", []).append((outputs, targets.clone()))

    def close(self, site: str, epoch: int) -> bool:
        """A site's block is complete; whether this was the last site, so that the epoch is judged."""
        metrics: SiteMetrics = {}
        for part in PARTS:
            batches = self._collected.pop(f"{site}/{part}", [])
            if batches:
                outputs, targets = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
                metrics[part] = measure(self._config.task, self._config.data, outputs, targets)
        return self.report(site, epoch, metrics)

    def report(self, site: str, epoch: int, metrics: SiteMetrics) -> bool:
        """A site's own figures for its block; whether the epoch is judged with them."""
        reported = self._reported.setdefault(epoch, {})
        reported[site] = metrics
        return self._judge_if_complete(epoch)

    def excuse(self, site: str) -> list[int]:
        """Wait for a site no more; the epochs that are judged thereby. What it has reported stays."""
        self._sites.discard(site)
        for part in PARTS:
            self._collected.pop(f"{site}/{part}", None)
        return [epoch for epoch in sorted(self._reported) if self._judge_if_complete(epoch)]

    def _judge_if_complete(self, epoch: int) -> bool:
        if not self._sites <= set(self._reported[epoch]):
            return False
        self._judge(epoch, self._reported.pop(epoch))
        return True

    def _judge(self, epoch: int, sites: Mapping[str, SiteMetrics]) -> None:
        total = {part: overall([metrics[part] for metrics in sites.values() if part in metrics]) for part in PARTS}
        self.history.append({"epoch": epoch, "sites": dict(sites), "overall": total})
        self.judged = max(epoch, self.judged)
        # Without validation patients there is nothing to choose by: the last epoch stands.
        reached = standing(self._config.task, validation) if (validation := total[Step.VALIDATION])["samples"] else None
        if reached is None or self._best_standing is None or reached > self._best_standing:
            self.best, self._best_standing = epoch, reached

    @property
    def exhausted(self) -> bool:
        """Whether `patience` evaluations in a row brought no improvement."""
        patience = self._config.run.patience
        since = [entry for entry in self.history if entry["epoch"] > self.best]
        return patience > 0 and len(since) >= patience

    def of(self, epoch: int) -> dict[str, Any] | None:
        """The history's entry for an epoch."""
        return next((entry for entry in self.history if entry["epoch"] == epoch), None)

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
            "reported": {str(epoch): dict(sites) for epoch, sites in self._reported.items()},
            "standing": self._best_standing, "best": self.best, "judged": self.judged,
            "history": list(self.history),
        }  # fmt: skip

    def restore(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Continue from `tensors` and `facts`."""
        self._sites = set(facts["sites"])
        self._reported = {int(epoch): sites for epoch, sites in facts["reported"].items()}
        self._best_standing = tuple(facts["standing"]) if facts["standing"] else None
        self.best, self.judged = facts["best"], facts["judged"]
        self.history = facts["history"]
        self._collected = {}
        for name, tensor in tensors.items():
            if name.startswith("evaluation/") and name.endswith("/outputs"):
                key = name.removeprefix("evaluation/").removesuffix("/outputs")
                self._collected[key] = [(tensor, tensors[f"evaluation/{key}/targets"])]


def parse_site_metrics(text: str, parts: Sequence[str] = PARTS) -> SiteMetrics:
    """Figures that a site computed itself, from its `Report`; ValueError when they are no such thing."""
    content = json.loads(text, parse_constant=_refuse_constant)
    if not isinstance(content, dict) or not set(content) <= set(parts):
        raise ValueError("not a map of parts")
    for metrics in content.values():
        if not isinstance(metrics, dict):
            raise ValueError("not a map of figures")
        for name, value in metrics.items():
            if not isinstance(name, str) or not (value is None or isinstance(value, float)):
                raise ValueError(f"{name!r} is not a figure")
    return content


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a figure")
