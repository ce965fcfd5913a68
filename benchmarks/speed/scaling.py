"""Many light sites on one broker: throughput, fairness, memory, beside a run of four sites with the same work.

    python -m benchmarks.speed.scaling [--quick] [--rounds N] [--sites 32 128] [--json FILE]

By night all sites publish their whole plan, so that each has a backlog; by day `nightsplit server` trains on it
in fair order while the sites apply what comes back. The server is a process, RabbitMQ and Redis are real, and
so are the sites' roles, engines and links (two connections each); but many sites live in one process and take
turns, and they tell the run store nothing. Their weights are as 2 : 3 : 4. The clock runs between 10 % and 90 %
of the training steps.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from benchmarks.speed.common import cpu_seconds, scratch
from benchmarks.speed.crowd import MESSAGE_BYTES, Crowd, in_processes
from benchmarks.speed.figures import Figure, Results, arguments
from tests.harness.services import RabbitNode, RedisServer

BASELINE = 4
"""Sites of the run that the others are compared with."""
CLOCK = (0.1, 0.9)
"""Parts of the steps between which throughput is taken."""
FAIR = (0.7, 0.95)
"""And fairness: before, a message more or less is over 1 % of a small site's; after, a backlog may be used up."""
END_S = 900.0


# ── the server ──────────────────────────────────────────────────────────────────────────────────


def nightsplit(verb: str, folder: Path) -> subprocess.Popen[bytes]:
    """A verb on server.toml, as a user starts it."""
    with (folder / "server.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "nightsplit", verb, "server.toml"], cwd=folder, stdout=log, stderr=log,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )  # fmt: skip


class Watch:
    """Observation of a server from outside: the order of its steps, their times, its memory."""

    def __init__(self, folder: Path, server: subprocess.Popen[bytes]) -> None:
        self.order: list[str] = []
        """Site of every training step."""
        self.times: list[float] = []
        """When each was seen."""
        self.cpu: list[float] = []
        """CPU seconds that the server had used then."""
        self.most_bytes = 0
        self._folder, self._server = folder, server
        self._read, self._cpu = 0, 0.0

    def until_the_end(self) -> None:
        """Look every 50 ms until the server has left."""
        deadline = time.monotonic() + END_S
        while self._server.poll() is None:
            if time.monotonic() > deadline:
                raise TimeoutError(self._log())
            self._look()
            time.sleep(0.05)
        self._look()
        if self._server.returncode:
            raise RuntimeError(self._log())

    def _look(self) -> None:
        path = self._folder / "report" / "metrics.jsonl"
        if path.exists():
            now = time.perf_counter()
            with path.open("rb") as file:
                file.seek(self._read)
                lines = file.read().rpartition(b"\n")[0]
            self._read += len(lines) + (1 if lines else 0)
            steps = [entry for entry in map(json.loads, lines.splitlines()) if entry["event"] == "train"]
            self.order += [entry["site"] for entry in steps]
            self.times += [now] * len(steps)
            self.cpu += [self._cpu] * len(steps)
        if self._server.returncode is None:
            self._cpu = cpu_seconds(self._server.pid)
            status = Path(f"/proc/{self._server.pid}/status").read_text()
            if "VmHWM" in status:  # not that of a process that has just ended
                self.most_bytes = 1024 * int(status.partition("VmHWM:")[2].split()[0])

    def _log(self) -> str:
        return (self._folder / "server.log").read_text()[-3000:]

    def per_step(self, readings: Sequence[float]) -> float:
        """Return the growth of `readings` with each step, between the parts of the run that `CLOCK` names."""
        first, last = (int(part * len(self.order)) for part in CLOCK)
        return (readings[last] - readings[first]) / (last - first)


def unfairness(order: Sequence[str], planned: Mapping[str, int], span: tuple[float, float] = FAIR) -> float:
    """Return the distance of a site's share of the steps so far from its weight, as a part of its weight, at the worst.

    Args:
        order: site of every step.
        planned: steps of each site; a weight is a site's part of all.
        span: looked at after every step between these parts of the run.
    """
    total, done, worst = len(order), Counter[str](), 0.0
    for number, site in enumerate(order, 1):
        done[site] += 1
        if span[0] * total <= number <= span[1] * total:
            worst = max(worst, *(abs(done[s] / number / (planned[s] / total) - 1) for s in planned))
    return worst


# ── the broker ──────────────────────────────────────────────────────────────────────────────────


class Broker:
    """A RabbitMQ node under observation."""

    def __init__(self, node: RabbitNode) -> None:
        self._node = node
        self._pid = int(node.ctl("eval", "os:getpid().").strip().strip('"'))

    def seen(self) -> dict[str, float]:
        """Bytes that Erlang holds, open files, CPU seconds."""
        total = int(self._node.ctl("eval", "[garbage_collect(P) || P <- processes()], erlang:memory(total)."))
        files = len(list(Path(f"/proc/{self._pid}/fd").iterdir()))
        return {"bytes": total, "files": files, "cpu": cpu_seconds(self._pid)}


# ── a night and a day ───────────────────────────────────────────────────────────────────────────


def night_and_day(
    crowd: Crowd, folder: Path, broker: str, store: str, look: Callable[[str], None] = lambda phase: None
) -> Watch:
    """One run of a crowd from its opening to its end, with the broker and the run store at these addresses.

    Args:
        look: called after each phase with its name: opened, connected, published, finished.
    """
    crowd.write(folder, broker, store)
    if nightsplit("open", folder).wait(END_S):
        raise RuntimeError((folder / "server.log").read_text()[-3000:])
    look("opened")
    with in_processes(crowd, 1 if crowd.sites <= BASELINE else 2, folder, broker) as workers:
        look("connected")
        for worker in workers:
            worker.say("night")
        for worker in workers:
            worker.hear(END_S)
        look("published")
        for worker in workers:
            worker.say("day")
        server = nightsplit("server", folder)
        try:
            watch = Watch(folder, server)
            watch.until_the_end()
        finally:
            server.kill()
            server.wait()
        for worker in workers:
            worker.hear(END_S)
    look("finished")
    return watch


def _node(folder: Path) -> RabbitNode:
    """A node as docs/how-to/scaling.md recommends it for many sites."""
    node = RabbitNode(folder)
    with (folder / "rabbitmq.conf").open("a") as settings:
        settings.write("tcp_listen_options.sndbuf = 131072\ntcp_listen_options.recbuf = 131072\n")
    return node


def measure(crowd: Crowd) -> dict[str, float]:
    """Return the needs and results of a crowd, by key."""
    seen: dict[str, dict[str, float]] = {}
    with scratch() as folder, _node(folder / "rabbitmq") as node, RedisServer(folder / "redis") as redis:
        url, broker = node.vhost(), Broker(node)

        def look(phase: str) -> None:
            seen[phase] = {"before": time.perf_counter(), **broker.seen(), "after": time.perf_counter()}

        look("empty")
        watch = night_and_day(crowd, folder, url, redis.url, look)

    steps = len(watch.order)
    return {
        "steps_per_s": 1 / watch.per_step(watch.times),
        "server_cpu_ms": 1e3 * watch.per_step(watch.cpu),
        "broker_cpu_ms": 1e3 * (seen["finished"]["cpu"] - seen["published"]["cpu"]) / steps,
        "unfairness": unfairness(watch.order, crowd.planned),
        "server_bytes": watch.most_bytes,
        "open_s": seen["opened"]["before"] - seen["empty"]["after"],
        "published_per_s": steps / (seen["published"]["before"] - seen["connected"]["after"]),
        "broker_bytes": seen["connected"]["bytes"],
        "broker_files": seen["connected"]["files"],
        "loaded_files": seen["published"]["files"],
        "bytes_per_message": (seen["published"]["bytes"] - seen["connected"]["bytes"]) / steps,
    }


def _figures(crowds: Sequence[int]) -> list[Figure]:
    figures = [Figure(f"steps_per_s_{BASELINE}", f"{BASELINE} sites: steps per second")]
    for sites in crowds:
        figures += [
            Figure(f"throughput_{sites}", f"{sites} sites: steps per second over {BASELINE} sites'"),
            Figure(f"server_cpu_{sites}", "  server's CPU time per step over theirs"),
            Figure(f"server_cpu_ms_{sites}", "  server's CPU ms per step"),
            Figure(f"broker_cpu_{sites}", "  broker's CPU time per step over theirs"),
            Figure(f"unfairness_{sites}", "  share of a site off its weight, at the worst", 0.02, 0.02, True),
            Figure(f"server_kib_{sites}", "  server's memory for each site more, KiB"),
            Figure(f"broker_kib_{sites}", "  broker's memory for each connected site more, KiB"),
            Figure(f"message_bytes_{sites}", "  broker's memory per waiting message, bytes"),
            Figure(f"files_{sites}", "  broker's open files for each connected site more"),
            Figure(f"loaded_files_{sites}", "  with a backlog"),
            Figure(f"open_s_{sites}", "  seconds to open the run"),
            Figure(f"steps_per_s_{sites}", "  steps per second"),
            Figure(f"published_per_s_{sites}", "  messages published per second"),
        ]
    return figures


def compared(sites: int, batches: int, few: Mapping[str, float]) -> dict[str, float]:
    """A crowd beside the baseline of few sites, by key."""
    many = measure(Crowd(sites, batches))

    def more(what: str) -> float:
        return (many[what] - few[what]) / (sites - BASELINE)

    values = {
        "throughput": many["steps_per_s"] / few["steps_per_s"],
        "server_cpu": many["server_cpu_ms"] / few["server_cpu_ms"],
        "broker_cpu": many["broker_cpu_ms"] / few["broker_cpu_ms"],
        "server_kib": more("server_bytes") / 1024,
        "broker_kib": more("broker_bytes") / 1024,
        "files": more("broker_files"),
        "loaded_files": more("loaded_files"),
        "message_bytes": many["bytes_per_message"],
        **{key: many[key] for key in ("unfairness", "server_cpu_ms", "open_s", "steps_per_s", "published_per_s")},
    }
    return {f"{key}_{sites}": value for key, value in values.items()}


def main() -> None:
    parser = arguments(__doc__ or "", rounds=3)
    parser.add_argument("--sites", type=int, nargs="+", default=[32, 128], help="crowds (default 32 128)")
    parser.add_argument("--batches", type=int, default=16384, help="of all sites together (default %(default)s)")
    options = parser.parse_args()
    if options.broker:
        parser.error("memory is measured at a broker that does nothing else: --broker cannot be used")
    batches = 2048 if options.quick else options.batches
    results = Results(_figures(options.sites), options.patience, options.retries, None)
    for number in range(1 if options.quick else options.rounds):
        results.console.print(f"round {number + 1}:")
        baseline = measure(Crowd(BASELINE, batches))
        results.add({f"steps_per_s_{BASELINE}": baseline["steps_per_s"]})
        for sites in options.sites:
            results.round(f"{sites} sites", partial(compared, sites, batches, baseline))
    results.finish(f"A night of many sites, a day of one server; messages of {MESSAGE_BYTES} bytes", options.json)


if __name__ == "__main__":
    main()
