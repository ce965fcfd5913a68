"""nightsplit predict: predictions of the trained model at a site, as a CSV; metrics go to stderr."""

import io
import sys
from pathlib import Path
from typing import Annotated

from typer import Option

from nightsplit.console.options import Overrides, SiteFile
from nightsplit.console.output import write_output


def predict(
    file: SiteFile,
    overrides: Overrides = [],
    top: Annotated[
        Path | None, Option(metavar="FILE", help="the server's part of the model, if the run did not export it")
    ] = None,
    data: Annotated[Path | None, Option(metavar="FILE", help="predict the rows of this file")] = None,
    output: Annotated[Path | None, Option(metavar="FILE", help="file of the CSV (default: print it)")] = None,
) -> None:
    """Use the trained model at a site.

    Predict this site's held-out test patients, or the rows of another file (with the columns of the site's own
    data, label included), and write a CSV with row, patient and prediction. Nothing leaves the site.
    """
    from nightsplit.site_worker.predict import predict
    from nightsplit.site_worker.worker import SiteWorker

    predictions = predict(SiteWorker(file, overrides), top, data)
    text = io.StringIO()
    predictions.write(text)
    write_output(output, text.getvalue().encode())
    figures = [f"{name} {value:.4g}" for name, value in predictions.metrics.items() if value is not None]
    print(", ".join(figures), file=sys.stderr)
