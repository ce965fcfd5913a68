"""Any process may die at any moment: real workers, real data, kill -9, one oracle.

    python -m tests.faults.chaos --kills 200 --points --broker rabbitmq
    python -m tests.faults.chaos --kills 200 --points --order fair
    python -m tests.faults.chaos --kills 0 --broker-kills 20 --broker rabbitmq
    python -m tests.faults.chaos --kills 0 --power-cuts 200
    python -m tests.faults.chaos --kills 60 --every 10 --epochs 1500 --broker rabbitmq
    python -m tests.faults.chaos --quick

Three sites and a server train on scikit-learn's diabetes panel, each a process that is started as a
user starts it, while a seeded nemesis kills them and starts them again with the same command. With
--broker rabbitmq, a private node and a private Redis; --broker-kills and --store-kills kill their processes,
and a publisher of numbered messages beside the training tells whether a confirmed one was lost. The embedded
broker has no process: all workers die at once in its place. A system whose sites send everything at once
(one upload, one update) trains for seconds: its run is repeated until there were enough kills. With --power-cuts,
all workers of the host die, and what they did not force to disk is gone (tests/harness/forgetful.py; root).

The oracle: planned messages never applied (`lost`), applied again (`applied_twice`), and whether all
final weights equal, to the bit, those of the same run without kills (strict order), or of a fresh run that
follows the order journal (fair order). Exit code 1 when one of them is not as it must be. Goodput is
steps that counted over steps made, times the time in which steps were made over the time since the first.
"""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.speed.common import scratch
from nightsplit.shared import crash_points
from nightsplit.shared.protocols.spec import PROTOCOLS, TRAINING, Shape, systems
from nightsplit.shared.run_store.connect import open_store
from tests.faults.nemesis import (
    GAP,
    WORKERS,
    Nemesis,
    ServiceName,
    Strike,
    clockwork,
    percentile_95,
    schedule,
    torch_import_seconds,
)  # fmt: skip
from tests.faults.numbered import Numbered
from tests.faults.oracle import Outcome, outcome_of
from tests.harness.forgetful import Host
from tests.harness.processes import Fresh, Process
from tests.harness.services import RabbitNode, RedisServer, Service
from tests.harness.workers import SHARES, Hospital

RUN = "lipids"
DISKS = ("broker", "store", "report", "ledgers", *(f"state/{worker}" for worker in WORKERS))
"""Folders of the run that are disks of their own where the power is cut."""
STEPS_PER_EPOCH = 19
"""Training batches of the three sites together; in rounds, an update of each site is a step."""
PEACE = 1.15
"""The run is so much longer than its schedule, so that everybody is still at work at the last strike."""
END_S = 1200.0
NOTICINGS = 3
ROUND_GAP, ONE_SHOT_GAP = 30, 400
"""Mean of updates between two strikes on a system of rounds, and of hundredths of a second where clocks tell."""
COUNTED = (
    "kills",
    "broker_kills",
    "store_kills",
    "kills_at_points",
    "gave_up",
    "lost",
    "applied_twice",
    "restarts_seen",
    "seconds",
)
"""Figures of several runs that are added up."""
ONE_SHOT_KILLS, ONE_SHOT_EPOCHS = 12, 60
"""Kills and epochs of one run of a system that sends everything at once."""


@dataclass(frozen=True)
class Campaign:
    """What is done to which run.

    Attributes:
        kills: workers to kill.
        broker_kills, store_kills: how often broker and store die besides.
        power_cuts: how often the host of all workers, embedded broker and SQLite loses power besides.
        seed: of the schedule.
        broker: a private RabbitMQ node with a private Redis, or embedded broker and SQLite.
        protocol, learning, order: of the run.
        points: crash points that restarted workers die at, in turn, besides the blind kills.
        gap: mean number of steps, or hundredths of a second, between two strikes; 0 for the system's usual one.
        epochs: of the run; 0 for as many as the schedule needs.
        every: seconds between two kills, of one worker each; 0 for a schedule in steps.
        noticings: how often to measure when `nightsplit status` notices a death.
        begin: how workers begin.
    """

    kills: int
    broker_kills: int = 0
    store_kills: int = 0
    power_cuts: int = 0
    seed: int = 1
    broker: Literal["rabbitmq", "embedded"] = "embedded"
    protocol: str = "split_labels"
    learning: Literal["steps", "targets"] = "steps"
    order: Literal["strict", "fair"] = "strict"
    points: Sequence[crash_points.Point] = ()
    gap: int = 0
    epochs: int = 0
    every: float = 0.0
    noticings: int = 0
    begin: type[Process | Fresh] = Fresh

    @property
    def one_shot(self) -> bool:
        """True if a site sends all that it has at once, so that it shows in no later step."""
        return PROTOCOLS[self.protocol].uploads_once or self.protocol == "data_vectors"

    @property
    def strikes(self) -> list[Strike]:
        """Blind kills; with crash points, these see to about the other half."""
        if self.every:
            return clockwork(self.seed, self.kills, self.every)
        of_shape = ROUND_GAP if self.protocol in systems(Shape.ROUND) else GAP
        gap = self.gap or (ONE_SHOT_GAP if self.one_shot else of_shape)
        blind = self.kills // 2 if self.points else self.kills
        return schedule(self.seed, blind, self.broker_kills, self.store_kills, self.power_cuts, gap)

    @property
    def needed_epochs(self) -> int:
        """Of a run that outlasts the schedule."""
        steps = len(SHARES) if self.protocol in systems(Shape.ROUND) else STEPS_PER_EPOCH
        return self.epochs or (ONE_SHOT_EPOCHS if self.one_shot else round(PEACE * self.strikes[-1].at / steps) + 2)


def undisturbed(campaign: Campaign, folder: Path, journal: Sequence[str] = ()) -> Outcome:
    """The campaign's run with nothing done to it, over the embedded broker.

    Args:
        campaign: says which run.
        folder: where it goes.
        journal: the order of another run, to be followed.
    """
    hospital = Hospital(
        folder, protocol=campaign.protocol, learning=campaign.learning, epochs=campaign.needed_epochs,
        order=campaign.order, begin=campaign.begin,
    )  # fmt: skip
    with closing(open_store("sqlite:run.db", RUN, folder)) as store:
        for position, sender in enumerate(journal, 1):
            store.claim_position(position, sender)
    with closing(hospital):
        for worker in WORKERS:
            hospital.start(worker)
        hospital.wait_for_end(END_S)
    return outcome_of(hospital)


def carry_out(
    campaign: Campaign, folder: Path, reference: Outcome | None = None, tell: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Play a campaign and judge it.

    Args:
        campaign: what to do.
        folder: where everything goes.
        reference: of the same strict run without kills, where it is known.
        tell: shown a line for every strike.

    Raises:
        Failed: a worker ended with an error, or the run hangs.
    """
    if reference is None and campaign.order == "strict":
        reference = undisturbed(campaign, folder / "calm")
    began = time.monotonic()
    with ExitStack() as stack:
        numbered = None
        services: dict[ServiceName, Service | Host] = {}
        addresses = {"broker": "embedded:broker", "store": "sqlite:store/run.db"}
        if campaign.broker == "rabbitmq":
            node = stack.enter_context(RabbitNode(folder / "rabbitmq"))
            redis = stack.enter_context(RedisServer(folder / "redis"))
            addresses = {"broker": node.url, "store": redis.url}
            services |= {"broker": node, "store": redis}
            if campaign.broker_kills:
                numbered = Numbered(node.url, campaign.seed)
                numbered.start()
                stack.callback(numbered.abandon)
        hospital = Hospital(
            folder / "run", protocol=campaign.protocol, learning=campaign.learning, epochs=campaign.needed_epochs,
            order=campaign.order, begin=campaign.begin, **addresses,
        )  # fmt: skip
        stack.enter_context(closing(hospital))
        if campaign.power_cuts:
            host = Host([hospital.folder / disk for disk in DISKS], campaign.seed)
            stack.enter_context(closing(host))
            stack.enter_context(closing(hospital))  # before the disks: nobody may be at work on them
            services["host"] = host
        nemesis = Nemesis(
            hospital, campaign.strikes, campaign.kills, campaign.seed, campaign.points, services,
            bool(campaign.every) or campaign.one_shot, not campaign.one_shot, campaign.noticings, tell,
        )  # fmt: skip
        nemesis.play()
        seconds = time.monotonic() - began
        ended = outcome_of(hospital)
        journal = _journal(addresses["store"], hospital.folder) if campaign.order == "fair" else []
        result: dict[str, Any] = {
            "kills": nemesis.kills,
            "kills_at_points": nemesis.died_at.total(),
            "broker_kills": nemesis.service_kills["broker"],
            "store_kills": nemesis.service_kills["store"],
            "power_cuts": nemesis.service_kills["host"],
            "gave_up": nemesis.gave_up,
            "lost": ended.lost,
            "applied_twice": ended.applied_twice,
        }
        if numbered is not None:
            result["confirmed_lost"], result["confirmed_disordered"] = numbered.examine()
            result["confirmed"] = len(numbered.confirmed)
    if reference is None:
        reference = undisturbed(campaign, folder / "calm", journal)
    watch = nemesis.watch
    restarts, imports = nemesis.restart_seconds, torch_import_seconds(hospital.folder.glob("*.log"))
    return {
        **result,
        "sha256_equal": ended.sha256 == reference.sha256,
        "metrics_equal": ended.metrics == reference.metrics,
        "sha256": ended.sha256,
        "restarts_seen": len(restarts),
        "restart_p95_seconds": percentile_95(restarts),
        "restart_median_seconds": statistics.median(restarts) if restarts else None,
        "import_p95_seconds": percentile_95(imports),
        "dead_noticed_seconds": max(nemesis.noticed_seconds, default=None),
        "steps_counted": watch.step,
        "steps_made": watch.made,
        "busy_seconds": round(watch.busy, 1),
        "goodput": watch.step / watch.made * watch.busy / watch.passed if watch.passed else None,
        "points": {f"{kind} {point}": count for (kind, point), count in sorted(nemesis.died_at.items())},
        "seconds": round(seconds, 1),
    }


def carry_out_all(campaign: Campaign, folder: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    """Play a campaign, in as many runs as it needs; one result for all of them."""
    if not campaign.one_shot:
        return carry_out(campaign, folder, tell=tell)
    reference = undisturbed(campaign, folder / "calm")
    total = Counter(dict.fromkeys(("kills", "broker_kills", "store_kills"), 0))
    result: dict[str, Any] = {}
    for number in itertools.count():
        part = replace(
            campaign, seed=campaign.seed + number, kills=min(ONE_SHOT_KILLS, campaign.kills - total["kills"]),
            broker_kills=min(1, campaign.broker_kills - total["broker_kills"]),
            store_kills=min(1, campaign.store_kills - total["store_kills"]),
        )  # fmt: skip
        if not part.strikes:
            return {**result, **total, "runs": number}
        result = carry_out(part, folder / f"run{number}", reference, tell)
        total.update({name: result[name] for name in COUNTED if name in result})
        if not passed(result):
            return {**result, **total, "runs": number + 1}
    raise AssertionError


def passed(result: dict[str, Any]) -> bool:
    """Whether the oracle is content."""
    failures = ("lost", "applied_twice", "confirmed_lost", "confirmed_disordered")
    equal = result["sha256_equal"] and result["metrics_equal"]
    return equal and not any(result.get(name) for name in failures)


def _journal(address: str, base: Path) -> list[str]:
    """The order in which a fair server applied what it got: the sender at position 1, 2, 3..."""
    senders: list[str] = []
    with closing(open_store(address, RUN, base)) as store:
        while (sender := store.journal_entry(len(senders) + 1)) is not None:
            senders.append(sender)
    return senders


def main(arguments: Sequence[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # so that broker and workers end, too
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, metavar="N", help="workers to kill (default %(default)s)")
    parser.add_argument("--broker-kills", type=int, default=0, metavar="N", help="how often the broker dies besides")
    parser.add_argument("--store-kills", type=int, default=0, metavar="N", help="how often the store dies besides")
    parser.add_argument("--power-cuts", type=int, default=0, metavar="N", help="how often the host loses power besides")
    parser.add_argument("--every", type=float, default=0.0, metavar="S", help="kill one worker every S seconds")
    parser.add_argument("--epochs", type=int, default=0, metavar="N", help="of the run (as many as it needs)")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of the schedule (default %(default)s)")
    parser.add_argument("--broker", choices=["rabbitmq", "embedded"], default="embedded")
    parser.add_argument("--protocol", choices=systems(*TRAINING), default="split_labels")
    parser.add_argument("--learning", choices=["steps", "targets"], default="steps")
    parser.add_argument("--order", choices=["strict", "fair"], default="strict")
    parser.add_argument("--points", action="store_true", help="half of the deaths at named points of the code")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE, flat")
    parser.add_argument("--quick", action="store_true", help="at most 8 kills: shows that it works")
    chosen = parser.parse_args(arguments)
    campaign = Campaign(
        kills=min(8, chosen.kills) if chosen.quick else chosen.kills,
        broker_kills=min(2, chosen.broker_kills) if chosen.quick else chosen.broker_kills,
        store_kills=min(2, chosen.store_kills) if chosen.quick else chosen.store_kills,
        power_cuts=min(2, chosen.power_cuts) if chosen.quick else chosen.power_cuts,
        seed=chosen.seed,
        every=chosen.every,
        epochs=chosen.epochs,
        broker=chosen.broker,
        protocol=chosen.protocol,
        learning=chosen.learning,
        order=chosen.order,
        points=crash_points.POINTS if chosen.points else (),
        noticings=NOTICINGS if chosen.kills and not chosen.quick and not chosen.every else 0,
    )
    with scratch() as folder:
        result = carry_out_all(campaign, folder, tell=lambda line: print(line, file=sys.stderr, flush=True))
    print(json.dumps(result, indent=2))
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if passed(result) else 1


if __name__ == "__main__":
    sys.exit(main())
