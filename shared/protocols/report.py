"""Report of a site about a model: metrics of its own held-out samples, by part. Both sides use one structure.

{"test": {"auc": 0.91, "balanced_accuracy": 0.83, "loss": 0.4, "samples": 12.0}, "validation": {...}}
"""

import json
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from nightsplit.shared.config.run import TaskSection
from nightsplit.shared.errors import mismatch
from nightsplit.shared.learning.metrics import FIGURES, Metrics

PARTS = ("validation", "test")

SiteMetrics = dict[str, Metrics]
"""Metrics by part: "validation", "test"."""

NO_FIGURES = "{}"
"""Report on a model that was not evaluated, or could not be."""

REPORT_CHARS_MAX = 2000
"""Longest report in characters."""

_DECODERS: Mapping[str, msgspec.json.Decoder[Any]] = {
    kind: msgspec.json.Decoder(dict[Literal["validation", "test"], figures])  # type: ignore[valid-type]
    for kind, figures in FIGURES.items()
}


def encode_report(task: TaskSection, metrics: Mapping[str, Metrics]) -> str:
    """Encode the metrics of each part as text."""
    report = {part: msgspec.convert(figures, FIGURES[task.kind]) for part, figures in metrics.items()}
    return json.dumps(msgspec.to_builtins(report), sort_keys=True)


def decode_report(text: str, task: TaskSection, samples: Mapping[str, int], name: str) -> SiteMetrics:
    """Decode untrusted text of message `name`; Refused 304 unless it is a report on this task.

    Figures may be of fewer than the announced `samples` by part, if some were unusable, never of more.
    """
    try:
        if len(text) > REPORT_CHARS_MAX:
            raise ValueError("too long")
        report: SiteMetrics = msgspec.to_builtins(_DECODERS[task.kind].decode(text))
        if any((metrics["samples"] or 0) > samples[part] for part, metrics in report.items()):
            raise ValueError("too many")
    except (msgspec.MsgspecError, ValueError):
        announced = ", ".join(f"{samples[part]} {part}" for part in PARTS)
        raise mismatch(f"{name} has no figures of {announced} samples.") from None
    return report
