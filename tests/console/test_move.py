"""nightsplit move refuses a run that does not stand still, and files that do not fit together."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path

import pytest

from nightsplit.broker.topology import query_queues
from nightsplit.console import move as module
from nightsplit.console.cli import run
from nightsplit.console.move import move_run
from nightsplit.console.worker_file import WorkerFile
from nightsplit.server_worker.worker import ServerWorker
from nightsplit.shared.errors import NightsplitError
from nightsplit.shared.run_store.status import Phase, WorkerStatus
from nightsplit.shared.runtime.process import lock_folder
from nightsplit.shared.transport import Delivery
from nightsplit.shared.wire.message import SERVER
from tests.harness.services import wait_until
from tests.harness.study import SITES, change, write_study


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was opened, so that each site has a manifest; and new.toml."""
    folder = write_study(tmp_path / "study")
    ServerWorker(folder / "server.toml").open_run()
    shutil.copy(folder / "server.toml", folder / "new.toml")
    change(folder / "new.toml", "embedded:broker", "embedded:new")
    monkeypatch.setattr(module, "TTL_SECONDS", 0.1)
    return folder


def moved(folder: Path, old: str = "server.toml", new: str = "new.toml") -> None:
    move_run(WorkerFile(folder / old), WorkerFile(folder / new))


def depths(folder: Path, name: str) -> list[list[int | None]]:
    file = WorkerFile(folder / name)
    return [[file.open_broker().depth(queue) for queue in queues] for queues in file.queues().values()]


def report(folder: Path, worker: str, phase: Phase) -> None:
    with closing(WorkerFile(folder / "server.toml").open_store()) as store:
        store.put_status(worker, WorkerStatus(phase=phase))


def test_what_stands_still_moves_there_and_back(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(study, "north", Phase.AWAY)
    arguments = ["move", str(study / "server.toml"), "--to", str(study / "new.toml")]
    assert run(arguments) == 0
    told = capsys.readouterr().out
    assert told.startswith("north: 1 message moved\nsouth: 1 message moved\nrun ward is now at embedded:new\n")
    assert depths(study, "server.toml") == [[0, 0, 0]] * 2
    assert depths(study, "new.toml") == [[0, 1, 0]] * 2
    assert run(arguments) == 0
    assert capsys.readouterr().out.startswith("north: 0 messages moved\n")
    moved(study, "new.toml", "server.toml")
    assert depths(study, "server.toml") == [[0, 1, 0]] * 2


def test_queries_move_too(study: Path) -> None:
    old, new = (WorkerFile(study / name) for name in ("server.toml", "new.toml"))
    queries = old.queues(query_queues)["north"]
    old.open_broker().declare(queries)
    with old.open_broker().link([], 1, "site") as link:
        for queue in queries:
            link.publish(queue, "m", [b"x"])
        wait_until(lambda: link.receive(0.1) is None and not link.unconfirmed, 30, "all to be stored")
    moved(study)
    assert [new.open_broker().depth(queue) for queue in queries] == [1, 1, 1]
    assert new.open_broker().depth(old.queues(query_queues)["south"].up) is None, "it had none"


@pytest.mark.parametrize("phase", [Phase.WORKING, Phase.WAITING, Phase.BLOCKED])
def test_a_site_that_runs(study: Path, phase: Phase) -> None:
    report(study, "south", phase)
    with pytest.raises(NightsplitError, match=r"E214 Run is in use: still running: south\. Fix: stop all workers"):
        moved(study)
    assert depths(study, "server.toml") == [[0, 1, 0]] * 2


def test_a_site_that_starts_in_the_meantime(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its messages may be at the old broker; it is told, and a further move brings them over."""

    def transfer(*arguments: object) -> list[int]:
        report(study, "north", Phase.WORKING)
        return []

    monkeypatch.setattr(module, "transfer", transfer)
    with pytest.raises(NightsplitError, match=r"E214 .*north"):
        moved(study)


def test_a_server_that_runs_here_or_elsewhere(study: Path) -> None:
    with lock_folder(study / "state" / SERVER), pytest.raises(NightsplitError, match="E503"):
        moved(study)
    with closing(WorkerFile(study / "server.toml").open_store()) as store:
        fence = store.acquire_lease("elsewhere", 10.0)
        assert fence is not None
        with pytest.raises(NightsplitError, match=r"E214 .*another server, with another state folder"):
            moved(study)
        store.release_lease("elsewhere", fence)
    moved(study)


def test_a_server_that_takes_over_ends_the_move(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lease of a move that was suspended ran out."""
    with closing(WorkerFile(study / "server.toml").open_store()) as store:

        def transfer(*arguments: object) -> list[int]:
            assert store.acquire_lease(module.lease_owner(study / "state" / SERVER, locked=True), 10.0)
            return [1]

        monkeypatch.setattr(module, "transfer", transfer)
        with pytest.raises(NightsplitError, match="E505"):
            moved(study)


def test_a_queue_that_is_too_full_for_the_new_broker(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages that a consumer held did not count: the old queue exceeds its limit. The other queues are moved."""
    (study / "run.toml").write_text((study / "run.toml").read_text() + "[wire]\nqueue_bytes = 100_000\n")
    for name in ("server.toml", "new.toml"):
        change(study / name, "embedded:", "embedded:small_")
    old, new = (WorkerFile(study / name) for name in ("server.toml", "new.toml"))
    ups = [queues.up for queues in old.queues().values()]
    old.open_broker().declare(queue for queues in old.queues().values() for queue in queues)
    with old.open_broker().link(ups, 30, "server") as link:
        for up, number in zip(ups, (60, 40), strict=True):
            for n in range(number):
                link.publish(up, f"m{n}", [bytes(2500)])
        wait_until(lambda: link.receive(0.1) is None and not link.unconfirmed, 30, "all to be stored")
    assert depths(study, "server.toml") == [[60, 0, 0], [40, 0, 0]]

    monkeypatch.setattr("nightsplit.broker.transfer.SILENCE_S_MAX", 0.5)
    with pytest.raises(NightsplitError, match=r"E209 .*ward.north.up is full.*new.toml, without this queue's site"):
        moved(study)
    assert [up for up, _, _ in depths(study, "new.toml")] == [40, 40]
    with new.open_broker().link([ups[0]], 30, "server") as link:
        for _ in range(30):
            delivery = link.receive(10.0)
            assert isinstance(delivery, Delivery)
            link.acknowledge(delivery)
    moved(study)
    assert depths(study, "server.toml") == [[0, 0, 0]] * 2
    assert depths(study, "new.toml")[1] == [40, 0, 0]


def test_files_that_do_not_fit_together(study: Path) -> None:
    with pytest.raises(NightsplitError, match=r"E103 .*north.toml: has no \[server\]"):
        moved(study, new="north.toml")
    with pytest.raises(NightsplitError, match=r"E605 .*no queue of run 'ward'"):
        moved(study, old="new.toml", new="server.toml")
    shutil.copy(study / "run.toml", study / "other.toml")
    change(study / "other.toml", "lr = 0.01", "lr = 0.02")
    change(study / "new.toml", "[server]", '[server]\nrun = "other.toml"')
    with pytest.raises(NightsplitError, match=r"E103 .*new.toml: server.run: another run than that of"):
        moved(study)
    assert depths(study, "server.toml") == [[0, 1, 0]] * len(SITES)
