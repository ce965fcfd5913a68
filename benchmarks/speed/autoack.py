"""Effect of the same kills on a loop with auto-ack and transient queues.

    python -m benchmarks.speed.autoack --kills 200 --seed 1 --json FILE

The schedule of `tests.faults.chaos` (same seed, same victims, same pauses) is played on the loop of
benchmarks/speed/autoack_loop.py: three sites and a server over a private RabbitMQ node, which is not killed.
When nothing has been learned for some seconds although every process is alive, the loop hangs, and hangs
for ever; so that the count can go on, all sites are then started again, as somebody would do by hand.

autoack_lost_per_kill   batches that were sent and never applied, and gradients that were sent and never
                        applied, per kill
autoack_hangs           how often the loop hung until somebody intervened
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.speed.autoack_loop import STOP
from benchmarks.speed.common import scratch
from nightsplit.shared.wire.message import SERVER
from tests.faults.nemesis import SITES, WORKERS, schedule
from tests.harness.services import RabbitNode
from tests.harness.workers import Hospital

HANGS_S = 5.0
"""A loop in which all workers are alive and none learned anything for so long waits for a lost message."""
LOOK_S = 0.05


class Loop:
    """The processes of one run.

    Args:
        folder: with the panel; the workers' notes go there.
        url: of the broker.
    """

    def __init__(self, folder: Path, url: str) -> None:
        self.hangs = 0
        self._folder, self._url = folder, url
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._noted: dict[str, int] = {}

    def start(self, worker: str) -> None:
        """The same command as ever."""
        self._noted[worker] = self._size(worker)
        self._processes[worker] = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.speed.autoack_loop", worker, self._url, os.fspath(self._folder)],
            stderr=subprocess.DEVNULL,
        )

    def kill(self, worker: str) -> None:
        """SIGKILL."""
        self._processes[worker].kill()
        self._processes[worker].wait()

    def close(self) -> None:
        """End the processes that are left."""
        for worker in self._processes:
            self.kill(worker)

    def work(self, steps: int) -> None:
        """Until the server has made so many steps; a loop that hangs is started again."""
        moved = time.monotonic()
        sizes: list[int] = []
        while self._steps() < steps:
            now = time.monotonic()
            if sizes != (sizes := [self._size(worker) for worker in WORKERS]):
                moved = now
            # Whoever has not noted "ready" since its start is still importing torch.
            ready = all(self._size(worker) > self._noted[worker] for worker in WORKERS)
            if ready and now - moved > HANGS_S:
                self.hangs += 1
                for site in SITES:
                    self.kill(site)
                    self.start(site)
                moved = now
            time.sleep(LOOK_S)

    def lost(self) -> int:
        """Number of messages that were sent and never applied, after the last ones under way have arrived."""
        (self._folder / STOP).touch()
        before = -1
        while before != (before := sum(self._size(worker) for worker in WORKERS)):
            time.sleep(HANGS_S)
        applied = set(self._notes(SERVER))
        lost = 0
        for site in SITES:
            notes = self._notes(site)
            learned = {f"{site} {line.split()[1]}" for line in notes if line.startswith("learned")}
            sent = {f"{site} {line.split()[1]}" for line in notes if line.startswith("sent")}
            lost += len(sent - applied) + len({line for line in applied if line.startswith(site)} - learned)
        return lost

    def _steps(self) -> int:
        return sum(line != "ready" for line in self._notes(SERVER))

    def _notes(self, worker: str) -> list[str]:
        path = self._folder / f"{worker}.txt"
        return path.read_text(encoding="utf-8").splitlines() if path.exists() else []

    def _size(self, worker: str) -> int:
        path = self._folder / f"{worker}.txt"
        return path.stat().st_size if path.exists() else 0


def main(arguments: Sequence[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # so that broker and workers end, too
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, metavar="N", help="workers to kill (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of the schedule (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE, flat")
    chosen = parser.parse_args(arguments)
    strikes = schedule(chosen.seed, chosen.kills, 0)
    with scratch() as folder, RabbitNode(folder / "rabbitmq") as node:
        hospital = Hospital(folder / "run")  # for its panel; its own workers stay away
        loop = Loop(hospital.folder, node.url)
        try:
            for worker in WORKERS:
                loop.start(worker)
            for strike in strikes:
                loop.work(strike.at)
                for worker in strike.victims:
                    loop.kill(worker)
                time.sleep(strike.pause)
                for worker in strike.victims:
                    loop.start(worker)
                print(f"step {strike.at}: {', '.join(strike.victims)}; {loop.hangs} hangs", file=sys.stderr, flush=True)
            loop.work(strikes[-1].at + 200)
            lost = loop.lost()
        finally:
            loop.close()
    result = {
        "kills": chosen.kills,
        "autoack_lost": lost,
        "autoack_lost_per_kill": lost / chosen.kills,
        "autoack_hangs": loop.hangs,
    }
    print(json.dumps(result, indent=2))
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
