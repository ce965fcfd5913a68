"""Encrypted queries on this computer, with sites and server online in turns.

night   each site submits its held-out test patients, and leaves
day     the server alone answers what is queued           as often as the model's queries need:
night   each site alone collects                           once (one_shot), or once for each frame (refresh)
"""

import csv
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from nightsplit.console.demo.play import IDLE_SECONDS, start
from nightsplit.console.ui.text import counted
from nightsplit.server_worker.query_worker import QueryServerWorker
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.learning.metrics import measure
from nightsplit.shared.wire.message import SERVER
from nightsplit.site_worker.predict import predict, select_dataset
from nightsplit.site_worker.query_worker import QuerySiteWorker
from nightsplit.site_worker.worker import SiteWorker


@dataclass(frozen=True)
class QueryResults:
    """Results of the encrypted queries of all sites, against the same model in the clear.

    Attributes:
        sequences: number of sequences.
        auc: AUC of the decrypted scores.
        plain_auc: AUC in the clear.
        difference: largest difference of a logit.
        decisions: number of sequences with another decision.
    """

    sequences: int
    auc: float | None
    plain_auc: float | None
    difference: float
    decisions: int


def play_queries(work: Path, config: RunConfig, console: Console) -> QueryResults | None:
    """Evaluate every site's test patients encrypted, in the folder of a finished run; None if a worker failed."""
    sites = config.run.sites
    console.print()
    console.print("Encrypted queries: keys stay at the sites, and the server never sees a plain number.")
    steps = QuerySiteWorker(work / f"{sites[0]}.toml").steps
    if not (_run_workers(work, [SERVER]) and _run_workers(work, sites, submit=True)):
        return None
    console.print(f"night 1, 22:00  server is offline; {counted(len(sites), 'site')} submitted their test patients")
    for day in range(1, steps + 1):
        began = time.monotonic()
        if not _run_workers(work, [SERVER]):
            return None
        seconds = max(0.0, time.monotonic() - began - IDLE_SECONDS)
        console.print(f"day {day},   08:00  sites are offline; the server answered without a key ({seconds:.0f} s)")
        if not _run_workers(work, sites):
            return None
        action = "the sites decrypted their scores" if day == steps else "the sites decrypted and encrypted again"
        console.print(f"night {day + 1}, 22:00  server is offline; {action}")
    return _compare(work, config)


def _run_workers(work: Path, names: Sequence[str], submit: bool = False) -> bool:
    """Run workers until they have nothing more to do; return whether none failed."""
    workers = [start(_work, name, work, submit) for name in names]
    for worker in workers:
        worker.join()
    return not any(worker.exitcode for worker in workers)


def _work(name: str, folder: Path, submit: bool) -> None:
    """Work as `nightsplit serve-queries server.toml` or `nightsplit query <name>.toml`."""
    if name == SERVER:
        QueryServerWorker(folder / "server.toml").work(IDLE_SECONDS)
        return
    site = QuerySiteWorker(folder / f"{name}.toml")
    if submit:
        site.submit(None)
    site.work(IDLE_SECONDS)


def _compare(work: Path, config: RunConfig) -> QueryResults:
    encrypted, plain, targets, patients = [], [], [], []
    for name in config.run.sites:
        site, scores = SiteWorker(work / f"{name}.toml"), io.StringIO()
        QuerySiteWorker(work / f"{name}.toml").write_scores(scores)
        scores.seek(0)
        encrypted += [float(row["logit"]) for row in csv.DictReader(scores)]
        plain += torch.logit(predict(site).values[:, 0].double()).tolist()
        dataset = select_dataset(site, None)
        targets.append(dataset.targets)
        patients += [f"{name}/{patient}" for patient in dataset.patients]
    figures = [
        measure(config.task, config.data, torch.tensor(logits)[:, None].float(), torch.cat(targets), tuple(patients))
        for logits in (encrypted, plain)
    ]
    difference = np.abs(np.subtract(encrypted, plain))
    decisions = int(np.sum((np.array(encrypted) > 0) != (np.array(plain) > 0)))
    return QueryResults(len(encrypted), figures[0]["auc"], figures[1]["auc"], float(difference.max()), decisions)
