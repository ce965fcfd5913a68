"""A hospital's connection of 4 Mbit/s with 200 ms there and back: gain by the codec, cost of an outage.

    python -m benchmarks.speed.links nights     bytes and seconds of an epoch of chest X-rays, by codec
    python -m benchmarks.speed.links accuracy   test AUC by codec, whole run, without a line
    python -m benchmarks.speed.links outages    from the line's return to the first message applied
    (--quick: less of it; shows that it works)

Real workers, RabbitMQ, default heartbeats; the line is tests/harness/links.py. An outage is silent: nobody is
told, and both ends believe in their connections. Needs NIGHTSPLIT_DATA for `nights` and `accuracy`.
"""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path

from msgspec.structs import replace
from rich.console import Console

from benchmarks.accuracy.study import EXAMPLES
from benchmarks.speed.common import scratch
from nightsplit.console.ui.text import columns
from nightsplit.shared.config.load import load
from nightsplit.shared.config.run import WireSection
from nightsplit.shared.protocols.load import load_run
from nightsplit.shared.runtime.process import prepare_torch
from nightsplit.shared.wire.codecs import FloatCodec
from nightsplit.simulation.run import simulate
from nightsplit.site_worker.config import SiteConfig
from nightsplit.site_worker.data.scaling import scale
from nightsplit.site_worker.data.source import read_splits
from nightsplit.site_worker.trust.approval import approve
from tests.harness.links import Line
from tests.harness.services import RabbitNode
from tests.harness.workers import Hospital

EXAMPLE = EXAMPLES / "radiograph"
BITS_PER_S, DELAY_S = 4e6, 0.1
WIRES: dict[str, tuple[FloatCodec, bool]] = {
    "fp32": ("fp32", False), "fp16 (default)": ("fp16", False), "int8": ("int8", False), "int8 + zstd": ("int8", True),
}  # fmt: skip
BASELINE = "fp16 (default)"
SHARE = 0.3
"""Part of the example's 4708 patients that the site has here."""
SUBSET = 0.4
"""Part of each site's patients that the runs for accuracy use."""
OUTAGES_S = (20.0, 90.0, 360.0)
PATIENCE_S = 900.0


# ── nights ──────────────────────────────────────────────────────────────────────────────────────


def night(folder: Path, node: RabbitNode, wire: tuple[FloatCodec, bool], share: float) -> tuple[float, int]:
    """One epoch of one site over the line; seconds from the first training step to the end, and bytes both ways."""
    shutil.copytree(EXAMPLE, folder)
    codec, zstd = wire
    run = (folder / "run.toml").read_text()
    run = re.sub(r"sites = .*", 'sites = ["north"]', re.sub(r"epochs = .*", "epochs = 1", run))
    (folder / "run.toml").write_text(
        f'{run}\n[wire]\nsmashed = "{codec}"\ngradient = "{codec}"\nzstd = {str(zstd).lower()}\n'
    )
    url = node.vhost()
    with Line(node.port, DELAY_S, BITS_PER_S) as line, ExitStack() as stack:
        for worker, address in (("server", url), ("north", url.replace(f":{node.port}/", f":{line.port}/"))):
            file = folder / f"{worker}.toml"
            text = file.read_text().replace("embedded:broker", address)
            file.write_text(text.replace("share = [0.0, 0.5]", f"share = [0.0, {share}]"))
        approve(folder / "north.toml", "benchmarks")
        workers = []
        for verb, worker in (("server", "server"), ("site", "north")):
            log = stack.enter_context((folder / f"{worker}.log").open("w"))
            command = [sys.executable, "-m", "nightsplit", verb, f"{worker}.toml"]
            workers.append(subprocess.Popen(command, cwd=folder, stdout=log, stderr=log))
            stack.callback(_end, workers[-1])
        metrics = folder / "report" / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text()):
            time.sleep(0.05)
            if any(process.poll() for process in workers):
                raise RuntimeError("\n".join(path.read_text() for path in folder.glob("*.log")))
        began, before = time.monotonic(), line.passed("up") + line.passed("down")
        for process in workers:
            process.wait(PATIENCE_S)
        return time.monotonic() - began, line.passed("up") + line.passed("down") - before


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()


def nights(console: Console, quick: bool) -> None:
    """Every codec, one after the other."""
    with scratch() as folder, RabbitNode(folder / "rabbitmq") as node:
        seen = {name: night(folder / name[:4] / str(zstd), node, (codec, zstd), 0.1 if quick else SHARE)
                for name, (codec, zstd) in WIRES.items()}  # fmt: skip
    table = columns("codec", "MB", "seconds", f"seconds over {BASELINE}", numbers=("MB", "seconds"))
    for name, (seconds, passed) in seen.items():
        table.add_row(name, f"{passed / 1e6:.1f}", f"{seconds:.0f}", f"{seconds / seen[BASELINE][0]:.2f}")
    console.print(table)


# ── accuracy ────────────────────────────────────────────────────────────────────────────────────


def auc(codec: FloatCodec, seed: int, epochs: int) -> float:
    """Test AUC of all sites' patients together, best epoch by validation; zstd loses nothing, so it has no part."""
    config = load_run(EXAMPLE / "run.toml")
    run = replace(config.run, seed=seed, epochs=epochs)
    config = replace(config, run=run, wire=WireSection(smashed=codec, gradient=codec))
    sources = {site: load(EXAMPLE / f"{site}.toml", SiteConfig).data for site in run.sites}
    parts = {
        site: scale(
            read_splits(
                replace(source, share=(source.share[0] * SUBSET, source.share[1] * SUBSET)), config, EXAMPLE
            ), config.data,
        )
        for site, source in sources.items()
    }  # fmt: skip
    found = simulate(config, parts).evaluate().pooled["auc"]
    assert found is not None
    return found


def accuracy(console: Console, quick: bool) -> None:
    """Every codec with the same seeds."""
    prepare_torch(1, "cpu")
    seeds, epochs = ((1,), 1) if quick else ((1, 2, 3), 6)
    table = columns("codec", "AUC", numbers=("AUC",))
    for codec in ("fp32", "fp16", "int8"):
        found = [auc(codec, seed, epochs) for seed in seeds]
        table.add_row(codec, f"{statistics.mean(found):.4f} ({min(found):.4f} to {max(found):.4f})")
    console.print(table)


# ── outages ─────────────────────────────────────────────────────────────────────────────────────


def outages(console: Console, quick: bool) -> None:
    """One run that outlasts all outages."""
    with scratch() as folder, RabbitNode(folder / "rabbitmq") as node, Line(node.port, DELAY_S, BITS_PER_S) as line:
        hospital = Hospital(folder / "run", node.url, epochs=1000)
        with closing(hospital):
            file = hospital.folder / "north.toml"
            file.write_text(file.read_text().replace(f":{node.port}/", f":{line.port}/"))
            for worker in hospital.workers:
                hospital.start(worker)
            hospital.wait_for_steps(20, PATIENCE_S)
            for seconds in (5.0,) if quick else OUTAGES_S:
                line.fall_silent()
                time.sleep(seconds)
                steps = hospital.steps
                line.heal()
                back = time.monotonic()
                hospital.wait_for_steps(steps + 1, PATIENCE_S)
                console.print(f"outage of {seconds:.0f} s: back after {time.monotonic() - back:.1f} s more")
                time.sleep(5.0)
            console.print((hospital.folder / "north.log").read_text(), soft_wrap=True)


def main() -> None:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # so that broker and workers end, too
    parts = {"nights": nights, "accuracy": accuracy, "outages": outages}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=parts)
    parser.add_argument("--quick", action="store_true", help="less of it: shows that it works")
    chosen = parser.parse_args()
    parts[chosen.part](Console(width=120), chosen.quick)


if __name__ == "__main__":
    main()
