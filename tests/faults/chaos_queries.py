"""Encrypted queries while either side dies at any moment: real workers, kill -9, the plain model as the oracle.

    python -m tests.faults.chaos_queries [--kills N] [--seed S] [--broker embedded|rabbitmq]

A small network is trained on made-up sequences. Then a site submits its test patients again and again, frame by frame
(refresh), while the server or the site is killed and started again with the same command. At the end every submission
has every score once, and it is the plain model's; exit code 1 otherwise.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack

from benchmarks.speed.common import scratch
from tests.harness.films import ask_under_kills, by_itself, expect_plain_scores, trained, write_study
from tests.harness.services import RabbitNode

PAUSE_S = 15.0
"""Between two kills at most: a worker takes seconds to start, and queries have to be answered in between."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="deaths in all (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of victims and moments (default %(default)s)")
    parser.add_argument("--broker", choices=["embedded", "rabbitmq"], default="embedded")
    chosen = parser.parse_args()
    with ExitStack() as stack:
        folder, broker = stack.enter_context(scratch()) / "film", "embedded:broker"
        if chosen.broker == "rabbitmq":
            broker = stack.enter_context(RabbitNode(folder.parent / "rabbitmq")).url
        trained(write_study(folder, recurrent=True, broker=broker))
        by_itself(folder, "serve-queries")
        died = ask_under_kills(folder, chosen.kills, chosen.seed, PAUSE_S, lambda line: print(line, flush=True))
        try:
            submissions = expect_plain_scores(folder)
        except AssertionError as error:
            print(f"wrong: {error}")
            return 1
    print(f"{died.total()} deaths ({died['server']} of the server, {died['site']} of the site)")
    print(f"{submissions} submissions, every score there once and equal to the plain model's within 1e-4")
    return 0


if __name__ == "__main__":
    sys.exit(main())
