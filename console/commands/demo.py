"""nightsplit demo: an example, played for real."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from nightsplit.console.options import AsJson


def demo(
    folder: Annotated[Path, Argument(metavar="FOLDER", help="an example's folder, or its name")] = Path("cholesterol"),
    at: Annotated[
        tuple[str, str] | None, Option(metavar="BROKER STORE", help="play at this RabbitMQ and Redis")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Play an example on this computer, in about a minute.

    Play it with a process for each hospital and one for the server: nights without a server, days without a
    hospital, and the end together. No service has to be installed; a RabbitMQ and a Redis of yours are named with
    --at amqp://guest@localhost redis://localhost
    """
    from nightsplit.console.demo.demo import run_demo

    return run_demo(folder, as_json, at)
