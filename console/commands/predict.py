"""nightsplit predict: the trained model at a site, as a CSV; its figures go to stderr."""

import io
import sys
from collections.abc import Sequence
from pathlib import Path

from nightsplit.console.output import write_output
from nightsplit.site_worker.predict import predict
from nightsplit.site_worker.worker import SiteWorker


def write_predictions(
    file: Path, overrides: Sequence[str], top: Path | None, data: Path | None, output: Path | None
) -> int:
    """Predict, and write the CSV to `output` or to stdout; returns the exit code. Raises: see `predict`."""
    predictions = predict(SiteWorker(file, overrides), top, data)
    text = io.StringIO()
    predictions.write(text)
    write_output(output, text.getvalue().encode())
    figures = [f"{name} {value:.4g}" for name, value in predictions.metrics.items() if value is not None]
    print(", ".join(figures), file=sys.stderr)
    return 0
