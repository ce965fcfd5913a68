"""nightsplit demo: an example, run on this computer."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from nightsplit.console.options import AsJson


def demo(
    folder: Annotated[Path, Argument(metavar="FOLDER", help="an example's folder, or its name")] = Path("cholesterol"),
    at: Annotated[tuple[str, str] | None, Option(metavar="BROKER STORE", help="use this RabbitMQ and Redis")] = None,
    as_json: AsJson = False,
) -> int:
    """Run an example on this computer, in about a minute.

    Run a process for each hospital and one for the server: nights without the server, days without the
    hospitals, and all together at the end. No service has to be installed; to use a RabbitMQ and a Redis of
    your own, add --at amqp://guest@localhost redis://localhost
    """
    from nightsplit.console.demo.demo import run_demo

    return run_demo(folder, as_json, at)
