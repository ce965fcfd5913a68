"""A site's state folder is restored from a backup, with the real workers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nightsplit.broker.embedded.broker import EmbeddedBroker
from nightsplit.broker.topology import site_queues
from nightsplit.server_worker.worker import ServerWorker
from nightsplit.shared.protocols.spec import TRAINING, systems
from nightsplit.shared.storage.checkpoint import Checkpoints
from nightsplit.site_worker.worker import SiteWorker
from tests.harness.workers import SHARES, Hospital

IDLE_S = 0.5
SITE = "north"


def night(hospital: Hospital, *sites: str) -> None:
    for site in sites:
        SiteWorker(hospital.folder / f"{site}.toml").work(IDLE_S)


def copy(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


@pytest.mark.parametrize("protocol", systems(*TRAINING))
def test_a_backup_from_before_the_last_hello_is_rejected(protocol: str, tmp_path: Path) -> None:
    hospital = Hospital(tmp_path / "run", protocol=protocol, epochs=2, keys=protocol != "split_u")
    state = hospital.folder / "state" / SITE
    ServerWorker(hospital.folder / "server.toml").open_run()
    night(hospital, SITE)
    copy(state, tmp_path / "backup")
    night(hospital, SITE)
    night(hospital, SITE)
    copy(tmp_path / "backup", state)
    try:
        hospital.start("server")
        assert hospital.start(SITE).wait(100) == 1
        assert hospital.last_line(SITE).startswith("E617"), hospital.logs()
    finally:
        hospital.close()


@pytest.mark.parametrize("protocol", ["split_labels", "split_u"])
def test_a_backup_from_after_the_last_hello_continues(
    protocol: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker has deleted the answers that were applied since; the server has copies of them."""
    hospital = Hospital(tmp_path / "run", protocol=protocol, epochs=2)
    state = hospital.folder / "state" / SITE
    server = ServerWorker(hospital.folder / "server.toml")
    server.open_run()
    night(hospital, *SHARES)
    server.work(IDLE_S)
    copy(state, tmp_path / "backup")
    down = site_queues("lipids", SITE, server.run_config.wire.queue_bytes).down
    broker = EmbeddedBroker(hospital.folder / "broker")
    answers = broker.depth(down)
    monkeypatch.setattr(Checkpoints, "interval_seconds", 0.0)
    night(hospital, SITE)
    assert (broker.depth(down) or 0) < (answers or 0), "the site has acknowledged none"
    copy(tmp_path / "backup", state)
    assert hospital.in_peace() == Hospital(tmp_path / "calm", protocol=protocol, epochs=2).in_peace()
