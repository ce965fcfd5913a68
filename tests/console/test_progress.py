"""What a worker tells on a terminal, and in lines of a file."""

from __future__ import annotations

import re
from io import StringIO

from msgspec.structs import replace

from nightsplit.console.ui.progress import Progress
from nightsplit.console.ui.text import counted, duration, screen, server_offline
from nightsplit.shared.errors import NightsplitError
from nightsplit.shared.run_store.status import Phase, SiteStatus, WorkerStatus


def test_progress_in_plain_lines(capsys):
    status = WorkerStatus(phase=Phase.WORKING, sent=9, planned=20, answered=4, queued=5, refused=0)
    with Progress("north", screen()) as progress:
        progress.observe(WorkerStatus(phase=Phase.STARTING))
        progress.observe(WorkerStatus(phase=Phase.WAITING, detail="its shift (22:00-06:00 UTC)"))
        progress.observe(replace(status, server="online"))
        progress.observe(replace(status, server="online", phase=Phase.IDLE))  # no news
        progress.observe(replace(status, server="offline"))
        progress.observe(replace(status, phase=Phase.IDLE))  # a run store that is not shared
        progress.observe(replace(status, phase=Phase.BLOCKED, detail="the queue is full", refused=2))
        progress.warn(["checkpoint 3 is damaged"])
    lines = [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "north: starting",
        "north: waiting for its shift (22:00-06:00 UTC)",
        "north: working (sent 9 of 20, answered 4)",
        "north: server is offline; 5 batches queued, they will be trained when it returns (sent 9 of 20, answered 4)",
        "north: 5 batches queued, waiting for the server (sent 9 of 20, answered 4)",
        "north: blocked: the queue is full (sent 9 of 20, answered 4, 2 refused)",
        "warning: checkpoint 3 is damaged",
    ]


def test_progress_on_a_terminal():
    from rich.console import Console

    console = Console(file=StringIO(), force_terminal=True, width=120)
    sites = {"north": SiteStatus(queued=3), "south": SiteStatus()}
    with Progress("server", console) as progress:
        progress.observe(WorkerStatus(phase=Phase.WORKING, applied=7, planned=20, refused=0, sites=sites))
    drawn = console.file.getvalue()
    assert "server: working" in drawn
    assert "applied 7 of 20, queued: north 3" in drawn


def test_words():
    said = [duration(s) for s in (5.9, 60, 200, 7500, 3 * 24 * 3600)]
    assert said == ["5 s", "1 min", "3 min", "2 h 5 min", "3 days"]
    assert counted(1, "batch") == "1 batch"
    assert server_offline(0) == "server is offline; nothing is queued"
    assert server_offline(1) == "server is offline; 1 batch queued, it will be trained when it returns"
    assert not issubclass(KeyboardInterrupt, NightsplitError)
