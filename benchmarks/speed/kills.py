"""Kills of anything at any moment, over all systems: what is lost, what comes twice, and what the kills cost.

    python -m benchmarks.speed.kills --kills 1000
    python -m benchmarks.speed.kills --kills 143 --systems split_u he_clstm

Every system works over a private RabbitMQ node and a private Redis while workers, node and Redis are killed (SIGKILL)
and started again, as tests/faults/chaos.py describes, and encrypted queries (he_clstm) as tests/harness/films.py does.
The scores of these must equal the plain model's within 1e-4, since every encryption has noise of its own; all weights
and metrics of the other systems must be equal to the bit. Exit code 1 if anything is lost, comes twice or differs.

Workers are forked from a process that has loaded the libraries: a kill hits the work and not the import of torch. The
goodput of workers that start as a user starts them: `python -m tests.faults.chaos --every 10`.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.speed.common import scratch
from nightsplit.shared.protocols.spec import PROTOCOLS, TRAINING, Shape, systems
from tests.faults.chaos import Campaign, carry_out_all, passed
from tests.harness.films import ask_under_kills, by_itself, expect_plain_scores, trained, write_study
from tests.harness.processes import Process
from tests.harness.services import RabbitNode

SERVICES = 16
"""One kill in so many is one of the broker, another one of the store."""
GAPS = {Shape.STREAM: 60, Shape.ROUND: 9}
"""Mean number of steps between two strikes: several fall between two checkpoints."""
QUERY_PAUSE_S = 6.0
COLUMNS = ("system", "workers", "broker", "store", "lost", "twice", "equal", "restart, median s", "minutes")


def train(system: str, kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """Play the kills on runs of a system that trains."""
    of_service = max(1, kills // SERVICES)
    campaign = Campaign(
        kills - 2 * of_service, of_service, of_service, seed=seed, broker="rabbitmq", protocol=system, begin=Process
    )
    if not campaign.one_shot:
        campaign = replace(campaign, gap=GAPS[PROTOCOLS[system].shape])
    result = carry_out_all(campaign, folder, _tell)
    return {**result, "passed": passed(result)}


def query(kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """Play the kills on encrypted queries to a trained model."""
    began, of_broker = time.monotonic(), max(1, kills // SERVICES)
    with RabbitNode(folder / "rabbitmq") as node:
        film = write_study(folder / "film", recurrent=True, broker=node.url)
        trained(film)
        by_itself(film, "serve-queries")
        died = ask_under_kills(film, kills, seed, QUERY_PAUSE_S, _tell, node, of_broker)
        try:
            expect_plain_scores(film)
            equal = True
        except AssertionError as error:
            _tell(f"wrong: {error}")
            equal = False
    return {
        "kills": died["server"] + died["site"], "broker_kills": died["broker"], "store_kills": 0,
        "lost": 0 if equal else None, "applied_twice": 0 if equal else None, "sha256_equal": equal,
        "seconds": time.monotonic() - began, "passed": equal,
    }  # fmt: skip


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    names = [*systems(*TRAINING), *systems(Shape.QUERY)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000, metavar="N", help="in all systems together")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of victims and moments")
    parser.add_argument("--systems", nargs="+", choices=names, default=names)
    chosen = parser.parse_args(arguments)
    table = Table(*COLUMNS, title=f"seed {chosen.seed}")
    results: list[dict[str, Any]] = []
    for number, system in enumerate(chosen.systems):
        kills = chosen.kills // len(chosen.systems) + (number < chosen.kills % len(chosen.systems))
        with scratch() as folder:
            play = query if system in systems(Shape.QUERY) else lambda *of: train(system, *of)  # noqa: B023
            result = play(kills, chosen.seed, folder)
        results.append(result)
        figures = [result[name] for name in ("kills", "broker_kills", "store_kills", "lost", "applied_twice")]
        restart = result.get("restart_median_seconds")
        table.add_row(
            system, *map(str, figures), "yes" if result["passed"] else "NO",
            f"{restart:.1f}" if restart else "", f"{result['seconds'] / 60:.1f}",
        )  # fmt: skip
        Console(width=120).print(table)
    killed = sum(result[name] for result in results for name in ("kills", "broker_kills", "store_kills"))
    print(f"{killed} kills")
    return 0 if all(result["passed"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
