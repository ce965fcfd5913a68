"""What Prometheus is told of a worker, and to whom."""

from __future__ import annotations

import socket
import ssl
import urllib.request
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from nightsplit.console.keys.ca import Authority
from nightsplit.shared.credentials import NO_CREDENTIALS, Credentials
from nightsplit.shared.errors import ConfigError
from nightsplit.shared.run_store.status import Phase, Presence, SiteStatus, WorkerStatus
from nightsplit.shared.runtime.metrics import Telemetry
from nightsplit.shared.runtime.metrics_server import serve_metrics
from tests.harness.services import free_port

SERVER_STATUS = WorkerStatus(
    phase=Phase.WORKING, run="ldl", digest="c0ffee", steps=40, applied=50, planned=100, epoch=2, fence=3,
    sites={
        "north": SiteStatus(
            outliers=5, queued=7, loss=0.25, staleness=4,
            presence=Presence(last_seen=datetime(2026, 11, 21, 22, tzinfo=UTC))
        ),
        "south": SiteStatus(excluded_at=12),
    },
)  # fmt: skip


class Told:
    """A worker's metrics, as Prometheus reads them."""

    def __init__(self, worker: str, *sites: str) -> None:
        self.now = 1000.0
        self.telemetry = Telemetry("ldl", worker, sites, lambda: self.now)
        self._worker = worker
        self._registry = CollectorRegistry()
        self._registry.register(self.telemetry)

    def __getitem__(self, metric: str) -> float | None:
        return self.of(metric)

    def of(self, metric: str, **labels: str) -> float | None:
        return self._registry.get_sample_value(f"nightsplit_{metric}", {"run": "ldl", "worker": self._worker, **labels})


def test_a_server_tells_of_itself_and_of_every_site() -> None:
    told = Told("server", "north", "south")
    told.telemetry.observe(SERVER_STATUS, Counter(sent=11, refused=1, sent_bytes=4096))
    assert told["messages_sent_total"] == 11
    assert told["messages_refused_total"] == 1
    assert told["messages_duplicate_total"] == 0
    assert told["sent_bytes_total"] == 4096
    assert (told["training_steps"], told["epoch"], told["fence"]) == (40, 2, 3)
    assert (told["plan_done_messages"], told["plan_messages"]) == (50, 100)
    assert told.of("queued_messages", site="north") == 7
    assert told.of("queued_messages", site="south") is None, "what nobody knows is not told as 0"
    assert told.of("training_loss", site="north") == 0.25
    assert told.of("staleness_steps", site="north") == 4
    assert (
        told.of("site_last_seen_timestamp_seconds", site="north") == datetime(2026, 11, 21, 22, tzinfo=UTC).timestamp()
    )
    assert told.of("site_last_seen_timestamp_seconds", site="south") is None
    assert told.of("site_excluded", site="north") == 0
    assert told.of("site_outliers", site="north") == 5
    assert told.of("site_excluded", site="south") == 1


def test_a_site_tells_of_itself() -> None:
    told = Told("north", "north")
    status = WorkerStatus(phase=Phase.IDLE, planned=100, sent=31, answered=27, queued=4)
    told.telemetry.observe(status, Counter(sent=2))
    assert told["messages_sent_total"] == 2, "this process's own, so that a restart is a reset"
    assert (told["plan_done_messages"], told["plan_messages"]) == (27, 100)
    assert told.of("queued_messages", site="north") == 4
    assert told.of("site_excluded", site="north") is None
    assert told["fence"] is None


def test_the_age_of_a_checkpoint_grows_until_there_is_another_one() -> None:
    told = Told("north", "north")
    told.now += 40
    assert told["checkpoint_age_seconds"] == 40
    told.telemetry.observe(WorkerStatus(phase=Phase.WORKING), Counter(checkpoints=1))
    told.now += 7
    told.telemetry.observe(WorkerStatus(phase=Phase.WORKING), Counter(checkpoints=1))
    assert told["checkpoint_age_seconds"] == 7
    assert told["checkpoints_total"] == 1


def test_a_batch_of_several_sites_has_a_line_of_its_own() -> None:
    told = Told("server", "north", "all")
    told.telemetry.observe(WorkerStatus(phase=Phase.WORKING, loss=0.5, sites={"north": SiteStatus()}), Counter())
    assert told.of("training_loss", site="all") == 0.5
    assert told.of("training_loss", site="north") is None
    assert told.of("site_excluded", site="all") is None


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.UNREADABLE])
def test_one_state_is_1_and_the_rest_0(phase: Phase) -> None:
    told = Told("north", "north")
    told.telemetry.observe(WorkerStatus(phase=phase), Counter())
    states = {known: told.of("state", state=known) for known in Phase}
    assert states.pop(Phase.UNREADABLE) is None, "no worker says this of itself"
    assert states == {known: float(known is phase) for known in states}


def ask(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


def test_a_port_that_somebody_has_is_an_error_with_a_number() -> None:
    address = f"127.0.0.1:{free_port()}"
    with serve_metrics(Telemetry("ldl", "north", ["north"]), address, NO_CREDENTIALS):
        with (
            pytest.raises(ConfigError) as caught,
            serve_metrics(Telemetry("ldl", "south", ["south"]), address, NO_CREDENTIALS),
        ):
            pass
        assert caught.value.number == 112
        assert "in use" in str(caught.value)
        assert 'nightsplit_state{run="ldl",state="starting",worker="north"} 1.0' in ask(f"http://{address}/metrics")
    with pytest.raises(OSError, match="refused"):
        ask(f"http://{address}/metrics")


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.7", "", "[::]", "monitoring.example.org"])
def test_beyond_this_machine_nothing_is_told_without_certificates(host: str, tmp_path: Path) -> None:
    for credentials in (NO_CREDENTIALS, Credentials(certificate=tmp_path / "north.pem", key=tmp_path / "north.key")):
        with (
            pytest.raises(ConfigError) as caught,
            serve_metrics(Telemetry("ldl", "north", []), f"{host}:9400", credentials),
        ):
            pass
        assert caught.value.number == 111


def test_a_certificate_that_is_not_there(tmp_path: Path) -> None:
    credentials = Credentials(*(tmp_path / name for name in ("ca.pem", "north.pem", "north.key")))
    with (
        pytest.raises(ConfigError) as caught,
        serve_metrics(Telemetry("ldl", "north", []), "0.0.0.0:9400", credentials),
    ):
        pass
    assert caught.value.number == 113


def test_beyond_this_machine_it_answers_those_with_a_certificate_of_the_same_authority(tmp_path: Path) -> None:
    own, foreign = Authority(tmp_path / "own"), Authority(tmp_path / "foreign")
    own.issue("north", tmp_path / "north.pem", tmp_path / "north.key")
    own.issue("prometheus", tmp_path / "prometheus.pem", tmp_path / "prometheus.key")
    foreign.issue("prometheus", tmp_path / "stranger.pem", tmp_path / "stranger.key")
    ca, port = tmp_path / "own" / "ca.pem", free_port()

    def answer_to(client: str | None, name: str = "north.nightsplit") -> str:
        """What Prometheus reads that expects the worker of this name."""
        shown = [None, None] if client is None else [tmp_path / f"{client}.pem", tmp_path / f"{client}.key"]
        with (
            socket.create_connection(("127.0.0.1", port), timeout=10) as line,
            Credentials(ca, *shown).tls().wrap_socket(line, server_hostname=name) as secure,
        ):
            secure.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            return secure.makefile("rb").read().decode()

    worker = Credentials(ca, tmp_path / "north.pem", tmp_path / "north.key")
    with serve_metrics(Telemetry("ldl", "north", ["north"]), f"0.0.0.0:{port}", worker):
        assert "nightsplit_state" in answer_to("prometheus")
        for client in (None, "stranger"):
            with pytest.raises(OSError, match=r"certificate required|unknown ca|reset|EOF|Broken pipe"):
                answer_to(client)
        with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
            answer_to("prometheus", "broker.example.org")
        with pytest.raises(OSError, match=r"disconnected|closed|reset"):
            ask(f"http://127.0.0.1:{port}/metrics")
