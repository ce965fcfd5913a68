"""A RabbitMQ cluster of three nodes: how long its leader's failures hold up, and what replication costs.

    python -m benchmarks.speed.cluster faults       longest pause between confirms, by fault; none may be lost
    python -m benchmarks.speed.cluster throughput   quorum queues against classic ones, on the same cluster
    python -m benchmarks.speed.cluster single       the same on a single node
    (--quick: less of it; shows that it works)

All three nodes run on this machine, so throughput shares its cores and its disk among them.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import time
from collections.abc import Callable

from rich.console import Console

from benchmarks.speed.common import MiB, Place, scratch
from benchmarks.speed.transport import SIZES, through
from nightsplit.broker.rabbitmq.broker import RabbitBroker
from nightsplit.broker.topology import site_queues
from nightsplit.console.ui.text import columns
from nightsplit.shared.transport import Queue
from tests.faults.numbered import QUEUE_BYTES, Numbered
from tests.harness.cluster import Cluster, ClusterNode, cluster
from tests.harness.services import RabbitNode, declared_as

WATCH_S = 40.0
ROUNDS = 5
VOLUME = 200 * 10**6


# ── faults ──────────────────────────────────────────────────────────────────────────────────────


def numbered_queues() -> list[Queue]:
    """Return the queues that `Numbered` publishes to."""
    return [queue for name in ("one", "two", "three") for queue in site_queues("numbered", name, QUEUE_BYTES)]


def pause_of(nodes: Cluster, first: int, strike: Callable[[ClusterNode], None], seconds: float) -> tuple[float, str]:
    """Measure one fault as a publisher sees it.

    Args:
        nodes: whole; node 0 declares the queues, and so leads them.
        first: the node that the publisher talks to; 0 is the one that fails.
        strike: what is done to node 0.
        seconds: how long to watch.

    Returns:
        The longest pause between two confirms, in seconds; and how many were confirmed, lost, out of order, copied.
    """
    RabbitBroker(nodes.url()).declare(numbered_queues())
    numbered = Numbered(nodes.url(first), seed=1)
    numbered.start()
    try:
        time.sleep(3.0)
        before = numbered.longest_pause()
        strike(nodes.nodes[0])
        time.sleep(seconds)
        pause = numbered.longest_pause()
        lost, disordered = numbered.examine()
    finally:
        numbered.abandon()
    told = f"{len(numbered.confirmed)}, {lost}, {disordered}, {numbered.copies}; {before:.2f} s before"
    return pause, told


def faults(console: Console, quick: bool) -> None:
    """Kill, freeze and cut off; for a publisher at the leader, and at another node."""
    strikes = {"killed": ClusterNode.kill, "frozen": ClusterNode.freeze, "cut off": ClusterNode.cut_off}
    seconds = 20.0 if quick else WATCH_S
    with scratch() as folder, cluster(folder) as nodes:
        version = ".".join(str(part) for part in nodes.nodes[0].version)
        pause_column, counts = f"longest pause, s, RabbitMQ {version}", "confirmed, lost, out of order, copies"
        table = columns("leader is", "publisher talks to", pause_column, counts)
        for name, strike in strikes.items():
            for first, where in enumerate(("the leader", "another node")):
                if name == "cut off":
                    nodes.nodes[0].make_ready_to_cut_off(nodes.peers(nodes.nodes[0]))
                pause, told = pause_of(nodes, first, strike, seconds)
                console.print(f"{name}, publisher at {where}: {pause:.1f} s; {told}")
                table.add_row(name, where, f"{pause:.1f}", told)
                nodes.nodes[0].restart()
                nodes.wait_until_whole()
                RabbitBroker(nodes.url()).delete(numbered_queues())
    console.print(table)


# ── throughput ──────────────────────────────────────────────────────────────────────────────────


def throughput(console: Console, quick: bool) -> None:
    """On a cluster, where quorum queues are replicated."""
    with scratch() as folder, cluster(folder) as nodes:
        compare(console, quick, nodes.nodes[0].url, nodes.url())


def single(console: Console, quick: bool) -> None:
    """On a single node."""
    with scratch() as folder, RabbitNode(folder) as node:
        compare(console, quick, node.url, node.url)


def compare(console: Console, quick: bool, one_host: str, hosts: str) -> None:
    """One publisher, one consumer; classic queues at `one_host` and quorum queues at `hosts` in turn."""
    table = columns("message", "classic, MB/s", "quorum, MB/s", "quorum over classic (from, to)")
    for name, size in SIZES.items():
        count = max(20, min((VOLUME // 10 if quick else VOLUME) // size, 2000))
        pairs = []
        for _ in range(2 if quick else ROUNDS):
            with declared_as("classic"):
                classic = through(Place(one_host, None), size, count)["mb_per_s"]
            with declared_as("quorum"):
                pairs.append((classic, through(Place(hosts, None), size, count)["mb_per_s"]))
        ratios = sorted(quorum / classic for classic, quorum in pairs)
        classic, quorum = (statistics.median(column) for column in zip(*pairs, strict=True))
        shown = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}, {ratios[-1]:.2f})"
        table.add_row(f"{size / MiB:g} MiB ({name})", f"{classic:.0f}", f"{quorum:.0f}", shown)
    console.print(table)


def main() -> None:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # so that the nodes end, too
    parts = {"faults": faults, "throughput": throughput, "single": single}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=parts)
    parser.add_argument("--quick", action="store_true", help="less of it: shows that it works")
    chosen = parser.parse_args()
    parts[chosen.part](Console(width=140), chosen.quick)


if __name__ == "__main__":
    main()
