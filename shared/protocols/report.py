"""What a site reports about a model: the figures of its own held-out samples, by part. Both sides use one structure.

{"test": {"auc": 0.91, "balanced_accuracy": 0.83, "loss": 0.4, "samples": 12.0}, "validation": {...}}
"""

import json
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from nightsplit.shared.config.run import TaskSection
from nightsplit.shared.errors import mismatch
from nightsplit.shared.learning.metrics import FIGURES, ClassFigures, MaskFigures, Metrics, ValueFigures

PARTS = ("validation", "test")

SiteMetrics = dict[str, Metrics]
"""Metrics by part: "validation", "test"."""

NO_FIGURES = "{}"
"""The text where a model is not judged, or could not be."""

LONGEST = 2000
"""Characters of a report."""

_Part = Literal["validation", "test"]

_DECODERS: Mapping[str, msgspec.json.Decoder[Any]] = {
    "binary": msgspec.json.Decoder(dict[_Part, ClassFigures]),
    "multiclass": msgspec.json.Decoder(dict[_Part, ClassFigures]),
    "regression": msgspec.json.Decoder(dict[_Part, ValueFigures]),
    "segmentation": msgspec.json.Decoder(dict[_Part, MaskFigures]),
}


def encode_report(task: TaskSection, metrics: Mapping[str, Metrics]) -> str:
    """Write what `measure` gave for each part as the text that travels."""
    report = {part: msgspec.convert(figures, FIGURES[task.kind]) for part, figures in metrics.items()}
    return json.dumps(msgspec.to_builtins(report), sort_keys=True)


def decode_report(text: str, task: TaskSection, samples: Mapping[str, int], name: str) -> SiteMetrics:
    """Read a report.

    Args:
        text: from whomever.
        task: of the run.
        samples: how many the site has announced, by part; it may report fewer, where some could not be judged.
        name: of the message.

    Raises:
        Refused: 304 it is not the report of such a site.
    """
    try:
        if len(text) > LONGEST:
            raise ValueError("too long")
        report: SiteMetrics = msgspec.to_builtins(_DECODERS[task.kind].decode(text))
        if any((metrics["samples"] or 0) > samples[part] for part, metrics in report.items()):
            raise ValueError("too many")
    except (msgspec.MsgspecError, ValueError):
        what = f"{name} has no figures of {', '.join(f'{samples[part]} {part}' for part in PARTS)} samples."
        raise mismatch(what) from None
    return report
