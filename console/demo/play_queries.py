"""Plays encrypted queries for real: when a site is there, no server is, and the other way round.

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
class Asked:
    """What came of the queries of all sites.

    Attributes:
        sequences: how many.
        auc: of the scores that came back.
        plain_auc: of the same model in the clear.
        difference: largest, between a logit and the one in the clear.
        decisions: how many of the sequences are called otherwise than in the clear.
    """

    sequences: int
    auc: float | None
    plain_auc: float | None
    difference: float
    decisions: int


def play_queries(work: Path, config: RunConfig, console: Console) -> Asked | None:
    """Have every site's test patients judged encrypted in the folder of a finished run; None when a worker failed."""
    sites = config.run.sites
    console.print()
    console.print("The model is asked, encrypted: keys stay at the sites, the server never sees a number.")
    steps = QuerySiteWorker(work / f"{sites[0]}.toml").steps
    if not (_alone(work, [SERVER]) and _alone(work, sites, submit=True)):
        return None
    console.print(f"night 1, 22:00  server is offline; {counted(len(sites), 'site')} submitted their test patients")
    for day in range(1, steps + 1):
        began = time.monotonic()
        if not _alone(work, [SERVER]):
            return None
        seconds = max(0.0, time.monotonic() - began - IDLE_SECONDS)
        console.print(f"day {day},   08:00  sites are offline; the server answered without a key ({seconds:.0f} s)")
        if not _alone(work, sites):
            return None
        there = "the sites decrypted their scores" if day == steps else "the sites decrypted and encrypted afresh"
        console.print(f"night {day + 1}, 22:00  server is offline; {there}")
    return _compared(work, config)


def _alone(work: Path, names: Sequence[str], submit: bool = False) -> bool:
    """Let these work until they have nothing more to do; whether none failed."""
    workers = [start(_work, name, work, submit) for name in names]
    for worker in workers:
        worker.join()
    return not any(worker.exitcode for worker in workers)


def _work(name: str, folder: Path, submit: bool) -> None:
    """What `nightsplit serve-queries server.toml` does, or `nightsplit query <name>.toml`."""
    if name == SERVER:
        QueryServerWorker(folder / "server.toml").work(IDLE_SECONDS)
        return
    site = QuerySiteWorker(folder / f"{name}.toml")
    if submit:
        site.submit(None)
    site.work(IDLE_SECONDS)


def _compared(work: Path, config: RunConfig) -> Asked:
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
    return Asked(len(encrypted), figures[0]["auc"], figures[1]["auc"], float(difference.max()), decisions)
