"""Who dies when: a seeded schedule, and what carries it out on real workers.

    work until the server has made `strike.at` steps ─▶ SIGKILL the victims ─▶ pause ─▶ the same commands again
    and wait until every one of them was seen at work, while workers with a crash point die by themselves

Moments are counted in training steps and not in seconds, so that a schedule fits its run on a fast
machine and on a slow one. Between two steps, chance alone decides where in its loop a worker is hit.
Where the sites show in no step (one upload, one update), moments are hundredths of a second.
"""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TextIO

from nightsplit.shared import crash_points
from nightsplit.shared.wire.message import SERVER
from tests.harness.forgetful import Host
from tests.harness.services import Service
from tests.harness.workers import SHARES, Hospital

SITES = tuple(SHARES)
WORKERS = (SERVER, *SITES)
AT_ONCE = (1, 1, 2, 2, 3, 4)
"""How many workers die together; each of these is as likely."""
GAP = 200
"""Mean number of training steps between two strikes: about what a server does between checkpoints."""
PAUSE_S = 1.0
"""Longest time that a victim stays dead."""
STALL_S = 0.5
"""A run that makes no step for so long does not count as at work."""
UNREACHABLE = ("E201", "E207")
"""Errors of a worker that finds no broker or store, and that a supervisor starts again."""
PATIENCE_S = 300.0
"""A run that stands still for so long hangs; importing torch four times at once takes a while, too."""
LOOK_S = 0.01


ServiceName = Literal["broker", "store", "host"]


# ── the schedule ────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Strike:
    """One blow.

    Attributes:
        at: its moment: training steps that the server has made, or hundredths of a second.
        victims: workers that are killed together.
        service: what dies in their place; a host takes all workers with it.
        pause: seconds until the victims are started again.
    """

    at: int
    victims: tuple[str, ...]
    service: ServiceName | None
    pause: float


def schedule(
    seed: int, kills: int, broker_kills: int, store_kills: int = 0, power_cuts: int = 0, gap: int = GAP
) -> list[Strike]:
    """Strikes that kill workers one by one or together, and in between broker, store and host so many times."""
    dice = random.Random(seed)
    groups: list[tuple[str, ...]] = []
    left = kills
    while left:
        size = min(left, dice.choice(AT_ONCE))
        groups.append(tuple(dice.sample(WORKERS, size)))
        left -= size
    services: list[ServiceName | None] = [None] * len(groups)
    services += ["broker"] * broker_kills + ["store"] * store_kills + ["host"] * power_cuts
    dice.shuffle(services)
    at, strikes = 0, []
    for service in services:
        at += dice.randint(1, 2 * gap)
        strikes.append(Strike(at, () if service else groups.pop(), service, dice.uniform(0.1, PAUSE_S)))
    return strikes


def clockwork(seed: int, kills: int, seconds: float) -> list[Strike]:
    """Strikes that kill one worker at a time, one every so many seconds."""
    dice = random.Random(seed)
    moments = [round(100 * seconds * (number + 1)) for number in range(kills)]
    return [Strike(at, (dice.choice(WORKERS),), None, 0.0) for at in moments]


# ── what can be seen of a run from outside ──────────────────────────────────────────────────────


class Watch:
    """Follows the server's metrics.jsonl through its restarts.

    Attributes:
        step: highest training step seen.
        made: training steps seen, each as often as it was made.
        busy: seconds in which steps were made, and `passed`: seconds since the first one.
        file: changes when a restarted server has taken the file over.
    """

    def __init__(self, path: Path) -> None:
        self.step = self.made = 0
        self.busy = self.passed = 0.0
        self.file: int | None = None
        self._first = self._last = 0.0
        self._path = path
        self._open: TextIO | None = None
        self._rest = ""

    def news(self) -> list[Mapping[str, Any]]:
        """Training steps that were written since the last look, but for those that a restarted server kept."""
        try:
            file = self._path.stat().st_ino
        except FileNotFoundError:
            return []
        if kept := file != self.file:
            self._count(self._read())  # what the last server wrote before it died
            self.close()
            self._open, self._rest = self._path.open(encoding="utf-8"), ""
            self.file = os.fstat(self._open.fileno()).st_ino
        found = self._read()
        self.step = max([self.step, *(line["step"] for line in found)])
        if kept:
            return []
        self._count(found)
        return found

    def _read(self) -> list[Mapping[str, Any]]:
        if self._open is None:
            return []
        *lines, self._rest = (self._rest + self._open.read()).split("\n")
        return [line for text in lines if (line := json.loads(text))["event"] == "train"]

    def _count(self, found: Sequence[Mapping[str, Any]]) -> None:
        if not found:
            return
        now = time.monotonic()
        self.made += len(found)
        self._first = self._first or now
        if self._last and now - self._last <= STALL_S:
            self.busy += now - self._last
        self._last, self.passed = now, now - self._first

    def close(self) -> None:
        """Close the file; it is read again from its beginning when there is news."""
        if self._open is not None:
            self._open.close()
        self._open = self.file = None


def torch_import_seconds(logs: Iterable[Path]) -> list[float]:
    """What importing torch took at each start, as PYTHONPROFILEIMPORTTIME=1 wrote it into the workers' logs."""
    return [
        int(line.split("|")[1]) / 1e6
        for log in logs
        for line in log.read_text(encoding="utf-8").splitlines()
        if line.startswith("import time:") and line.split("|")[-1].strip() == "torch"
    ]


def percentile_95(values: Sequence[float]) -> float | None:
    """Of at least two values."""
    return statistics.quantiles(values, n=20, method="inclusive")[-1] if len(values) > 1 else None


# ── carrying it out ─────────────────────────────────────────────────────────────────────────────


class Failed(Exception):
    """The run did what it must not: a worker ended with an error, or nothing moved any more."""


@dataclass
class Nemesis:
    """Plays a schedule on the workers of a hospital, which it starts, restarts and sees to their end.

    Args:
        hospital: the run; nothing of it is started yet.
        strikes: what to do, until there were enough kills.
        enough: kills after which the run is left in peace, once every crash point was reached.
        seed: of the crash points' numbers.
        points: crash points that workers are started with, in turn; empty for blind kills alone.
        services: broker and store, where they are processes (otherwise all workers die in their place), and the host.
        by_clock: whether moments are hundredths of a second, and the run may end before its schedule.
        sites_show: whether a site that works is named in the training steps.
        noticings: how often a victim stays dead until `nightsplit status` no longer shows it as online.
        tell: shown a line for every strike.

    Attributes:
        kills: workers that died.
        service_kills: how often broker and store were killed.
        gave_up: workers that ended by themselves because broker or store were dead.
        died_at: of these, by a crash point, as ("server" or "site", point).
        restart_seconds: from the start of a worker to the next training step that needed it.
        noticed_seconds: from a worker's death to the first status that shows it.
    """

    hospital: Hospital
    strikes: Sequence[Strike]
    enough: int
    seed: int
    points: Sequence[crash_points.Point] = ()
    services: Mapping[ServiceName, Service | Host] = field(default_factory=dict)
    by_clock: bool = False
    sites_show: bool = True
    noticings: int = 0
    tell: Callable[[str], None] = lambda line: None
    kills: int = 0
    service_kills: Counter[ServiceName] = field(default_factory=Counter)
    gave_up: int = 0
    died_at: Counter[tuple[str, str]] = field(default_factory=Counter)
    restart_seconds: list[float] = field(default_factory=list)
    noticed_seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._dice = random.Random(self.seed)
        self.watch = Watch(self.hospital.folder / "report" / "metrics.jsonl")
        self._turn = {"server": list(self.points), "site": list(self.points)}
        self._armed: dict[str, crash_points.Point] = {}
        self._awaited: dict[str, float] = {}
        """Workers not seen at work since they were started, and when that was."""
        self._server_file: int | None = None
        """What the server that was started last has yet to replace."""
        self._server_back = math.inf
        """When it was seen at work."""

    def play(self) -> None:
        """Start everybody, strike as scheduled, and wait for the end of the run.

        Raises:
            Failed: see there.
        """
        with closing(self.watch):
            self._play()

    def _play(self) -> None:
        self._began = time.monotonic()
        for worker in WORKERS:
            self._start(worker)
        notice_at = {len(self.strikes) * (n + 1) // (self.noticings + 1) for n in range(self.noticings)}
        for number, strike in enumerate(self.strikes):
            self._until(partial(self._ripe, strike.at))
            if self.by_clock and self._over():
                break
            if self.kills >= self.enough and not strike.service:
                continue
            struck = time.monotonic()
            self._strike(strike, number in notice_at)
            if not self.sites_show:
                self._began += time.monotonic() - struck  # the clock stands still: the next moment is one of work
            self.tell(
                f"{self.kills} kills, {self.service_kills.total()} of services; step {self.watch.step}: "
                f"{strike.service or ', '.join(strike.victims)}"
            )
        self._until(self._over)

    def _ripe(self, at: int) -> bool:
        moment = 100 * (time.monotonic() - self._began) if self.by_clock else self.watch.step
        return (not self._awaited and moment >= at) or (self.by_clock and self._over())

    def _over(self) -> bool:
        return all(process.poll() == 0 for process in self.hospital.processes.values())

    def _start(self, worker: str) -> None:
        """The same command as ever; with the next crash point of its kind, where there are any."""
        environment = {"PYTHONPROFILEIMPORTTIME": "1"}
        if point := self._next_point(_kind(worker)):
            self._armed[worker] = point
            # A checkpoint is written every few hundred messages, all else happens to each of them.
            number = self._dice.randint(1, 2 if "rename" in point or "checkpoint" in point else 100)
            environment[crash_points.VARIABLE] = f"{point}:{number}"
        if worker == SERVER:
            self._server_file, self._server_back = self.watch.file, math.inf
        self.hospital.start(worker, environment=environment)
        if self.sites_show:
            self._awaited[worker] = time.monotonic()

    def _next_point(self, kind: str) -> crash_points.Point | None:
        """The one at which fewest died so far; when there were enough kills, only one at which nobody did."""
        point = min(self._turn[kind], key=lambda point: self.died_at[kind, point], default=None)
        if point is None or (self.kills >= self.enough and self.died_at[kind, point]):
            return None
        self._turn[kind].remove(point)
        return point

    def _strike(self, strike: Strike, until_noticed: bool) -> None:
        service = self.services.get(strike.service) if strike.service else None
        everybody = strike.service == "host" or (strike.service and service is None)
        victims = WORKERS if everybody else strike.victims
        for worker in victims:
            self._bury(worker)
        if strike.service:
            self.service_kills[strike.service] += 1
        if strike.service == "host":
            self.watch.news()
            self.watch.close()  # its disk goes
        if service is not None:
            service.kill()
        if until_noticed and victims:
            self.noticed_seconds.append(self._wait_until_noticed(victims[0]))
        time.sleep(strike.pause)
        if service is not None:
            service.start()
        for worker in victims:
            self._start(worker)

    def _bury(self, worker: str) -> None:
        """kill -9, unless it has died by itself in this moment."""
        if self.hospital.processes[worker].poll() is None:
            self.hospital.kill(worker)
            self.kills += 1
            if worker in self._armed:  # its point comes later
                self._turn[_kind(worker)].append(self._armed.pop(worker))
        else:
            self._attend(worker)

    def _attend(self, worker: str) -> bool:
        """Look after a process that has ended; whether it is to be started again."""
        code = self.hospital.processes[worker].poll()
        if code in (None, 0):
            return False
        if self.services and self.hospital.last_line(worker).startswith(UNREACHABLE):
            self.gave_up += 1
            if worker in self._armed:
                self._turn[_kind(worker)].append(self._armed.pop(worker))
            return True
        if code != crash_points.EXIT_CODE or worker not in self._armed:
            raise Failed(f"{worker} ended with {code}:\n{self.hospital.logs()}")
        self.kills += 1
        point = self._armed.pop(worker)
        self.died_at[_kind(worker), point] += 1
        self._turn[_kind(worker)].append(point)
        return True

    def _until(self, condition: Callable[[], bool]) -> None:
        """Wait until then while the run goes on; workers that die by themselves are started again."""
        moved = time.monotonic()
        while not condition():
            if self._over() and not condition():  # it may be its end that is waited for
                raise Failed(f"the run ended at step {self.watch.step}, before its schedule")
            revived = [worker for worker in WORKERS if self._revive(worker)]
            if self._look() or revived:
                moved = time.monotonic()
            elif time.monotonic() - moved > PATIENCE_S:
                raise Failed(f"it hangs at step {self.watch.step}:\n{self.hospital.logs()}")
            time.sleep(LOOK_S)

    def _revive(self, worker: str) -> bool:
        died = self._attend(worker)
        if died:
            self._start(worker)
        return died

    def _look(self) -> bool:
        """Take in what the server wrote; whether that was anything."""
        news = self.watch.news()
        now = time.monotonic()
        server_is_back = SERVER not in self._awaited or self.watch.file != self._server_file
        if not news or not server_is_back:
            return bool(news)
        if SERVER in self._awaited:
            self.restart_seconds.append(now - self._awaited.pop(SERVER))
            self._server_back = now
        for site in {line.get("site") for line in news} & set(self._awaited):
            started = self._awaited.pop(site)
            # A server that was started with it repeats older steps first: they say nothing of the site.
            if started > self._server_back:
                self.restart_seconds.append(now - started)
        return True

    def _wait_until_noticed(self, worker: str) -> float:
        """Seconds from now until a status, asked for again and again, shows that the worker is away."""
        died = time.monotonic()
        while True:
            said = json.loads(self.hospital.call("status", "server.toml", "--json").stdout)
            if not next(line["online"] for line in said["workers"] if line["worker"] == worker):
                return time.monotonic() - died


def _kind(worker: str) -> str:
    return "server" if worker == SERVER else "site"
