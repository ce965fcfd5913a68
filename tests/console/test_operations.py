"""What an operator sees of a real run: metrics, the dashboard and the alarms made of them, and the log."""

from __future__ import annotations

import json
import re
import shutil
import time
import urllib.request
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from nightsplit.broker.embedded.broker import EmbeddedBroker
from nightsplit.broker.topology import site_queues
from tests.harness.services import RabbitNode, RedisServer, free_port, wait_until
from tests.harness.study import begin, change, end, end_all, write_study
from tests.harness.workers import Hospital

SITES = ("north", "south")
ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "examples" / "monitoring"
OWN = re.compile(r"\bnightsplit_[a-z_]+")
ANY = re.compile(r"\b(?:nightsplit|rabbitmq|process)_[a-z_]+")


def expressions() -> list[str]:
    """Every PromQL expression of the dashboard and the alarms."""
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    found = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    alarms = (MONITORING / "alerts.yml").read_text()
    return found + re.findall(r"expr: (?:>\n)?((?:.|\n)+?)\n +(?:for|annotations):", alarms)


def small(folder: Path, sites: Sequence[str], epochs: int, **where: str) -> Hospital:
    """A run of few sites, since every process costs its start."""
    return Hospital(folder, epochs=epochs, sites=sites, **where)


# ── metrics ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RabbitNode, int]]:
    """A node with RabbitMQ's own metrics, and their port."""
    node, port = RabbitNode(tmp_path_factory.mktemp("node")), free_port()
    (node.folder / "enabled_plugins").write_text("[rabbitmq_prometheus].\n")
    with (node.folder / "rabbitmq.conf").open("a") as settings:
        settings.write(f"prometheus.tcp.ip = 127.0.0.1\nprometheus.tcp.port = {port}\n")
    with node:
        yield node, port


Samples = dict[str, dict[str, float]]


def scrape(port: int, path: str = "metrics") -> Samples:
    """What Prometheus would read: value by labels by metric; nothing while nobody listens."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=10) as answer:
            text = answer.read().decode()
    except OSError:
        return {}
    found: Samples = {}
    for name, labels, value in re.findall(r"^(\w+)(\{.*\})? (\S+)$", text, re.MULTILINE):
        found.setdefault(name, {})[labels] = float(value)
    return found


@pytest.fixture(scope="module")
def seen(
    node: tuple[RabbitNode, int], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, list[Samples]], Hospital]:
    """All that the workers of a run, and the broker, told while it went on."""
    hospital = small(tmp_path_factory.mktemp("run") / "run", SITES, 60, broker=node[0].vhost())
    ports = {worker: free_port() for worker in hospital.workers}
    for worker, port in ports.items():
        change(hospital.folder / f"{worker}.toml", "store =", f'metrics = "127.0.0.1:{port}"\nstore =')
    told: dict[str, list[Samples]] = {name: [] for name in (*ports, "broker", "queues")}
    try:
        for worker in hospital.workers:
            hospital.start(worker)

        def over() -> bool:
            for worker, port in ports.items():
                if samples := scrape(port):
                    told[worker].append(samples)
            if told["server"] and not any("rabbitmq_detailed_queue_messages" in samples for samples in told["queues"]):
                told["broker"].append(scrape(node[1]))
                told["queues"].append(scrape(node[1], "metrics/detailed?family=queue_coarse_metrics"))
            time.sleep(0.1)
            return all(process.poll() is not None for process in hospital.processes.values())

        wait_until(over, 250, "the end of the run")
        hospital.wait_for_end()
    finally:
        hospital.close()
    return told, hospital


def values(told: list[Samples], metric: str, worker: str, site: str = "") -> list[float]:
    """A metric over time."""
    of_site = f'site="{site}",' if site else ""
    labels = f'{{run="lipids",{of_site}worker="{worker}"}}'
    return [samples[metric][labels] for samples in told if labels in samples.get(metric, {})]


@pytest.mark.timeout(300)
def test_the_metrics_tell_what_happened(seen: tuple[dict[str, list[Samples]], Hospital]) -> None:
    told, hospital = seen
    report = json.loads((hospital.folder / "report" / "report.json").read_text())
    server = told["server"]
    assert len(server) > 10

    for worker in hospital.workers:
        for counter in (
            "messages_sent_total",
            "messages_confirmed_total",
            "messages_applied_total",
            "sent_bytes_total",
        ):
            counted = values(told[worker], f"nightsplit_{counter}", worker)
            assert counted == sorted(counted), counter
            assert counted[-1] > 50, counter
    sent = sum(values(told[site], "nightsplit_sent_bytes_total", site)[-1] for site in SITES)
    received = values(server, "nightsplit_received_bytes_total", "server")[-1]
    assert sent / 2 < received < sent * 2, "told at moments that are a second apart"

    assert values(server, "nightsplit_fence", "server")[-1] == 1
    assert 0 < values(server, "nightsplit_training_steps", "server")[-1] <= report["steps"]
    assert values(server, "nightsplit_plan_messages", "server")[-1] == sum(
        site["messages"] for site in report["sites"].values()
    )
    metrics = [json.loads(line) for line in (hospital.folder / "report/metrics.jsonl").read_text().splitlines()]
    trained = [line for line in metrics if line["event"] == "train"]
    for site in SITES:
        for metric, fact in (("nightsplit_training_loss", "loss"), ("nightsplit_staleness_steps", "staleness")):
            known = {line[fact] for line in trained if line["site"] == site}
            assert set(values(server, metric, "server", site)) <= known
            assert values(server, metric, "server", site), metric
        assert values(server, "nightsplit_site_last_seen_timestamp_seconds", "server", site)
        assert set(values(server, "nightsplit_site_excluded", "server", site)) == {0}


def test_dashboard_and_alarms_name_what_is_there_and_all_of_it(
    seen: tuple[dict[str, list[Samples]], Hospital],
) -> None:
    told, hospital = seen
    exposed = {name for name_of in told.values() for samples in name_of for name in samples}
    own = {name for worker in hospital.workers for samples in told[worker] for name in samples}
    mentioned = {name for expression in expressions() for name in ANY.findall(expression)}
    assert mentioned <= exposed, "dashboard.json or alerts.yml asks for what nobody tells"
    assert {name for name in own if name.startswith("nightsplit_")} == {n for n in mentioned if OWN.match(n)}
    page = (ROOT / "docs" / "reference" / "logs_and_metrics.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(nightsplit_\w+)` \|", page, re.MULTILINE)) == {n for n in mentioned if OWN.match(n)}


def test_every_alarm_has_its_paragraph() -> None:
    alarms = re.findall(r"- alert: (\w+)", (MONITORING / "alerts.yml").read_text())
    page = (ROOT / "docs" / "how-to" / "operations.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([A-Z]\w+)` \|", page, re.MULTILINE) == alarms


# ── the log ─────────────────────────────────────────────────────────────────────────────────────

PATIENT, FILE, VALUE = "Erika-Mustermann", "klinikum-mustermann-1957.csv", "geheimwert"
STANDARD = {"time", "level", "worker", "run", "event"}


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Path]:
    """A study whose table, and the table's name, would tell who a patient is."""
    folder = write_study(tmp_path / "study")
    heading, *rows = (folder / "patients.csv").read_text().splitlines()
    named = [f"{heading},patient", *(f"{row},{PATIENT}-{n}" for n, row in enumerate(rows))]
    (folder / FILE).write_text("\n".join(named) + "\n")
    (folder / "patients.csv").unlink()
    for site in ("north", "south"):
        change(folder / f"{site}.toml", 'path = "patients.csv"', f'path = "{FILE}"\npatient = "patient"')
    end(begin(folder, "open", "server.toml"))
    yield folder
    end_all()


def log_of(folder: Path, *arguments: str, code: int = 0) -> list[dict[str, object]]:
    """Let a worker work; its stderr is its log, and tells nothing of a patient."""
    out, err = end(begin(folder, *arguments, "--log-format", "json"), code)
    assert out == ""
    for secret in (PATIENT, FILE, VALUE):
        assert secret not in err
    lines: list[dict[str, object]] = [json.loads(line) for line in err.splitlines()]
    assert lines
    for line in lines:
        assert line.keys() >= STANDARD, line
    return lines


def events(lines: list[dict[str, object]]) -> list[object]:
    return [line["event"] for line in lines if line["event"] != "progress"]


@pytest.mark.timeout(300)
def test_the_log_tells_every_transition_and_nothing_of_a_patient(study: Path) -> None:
    night = log_of(study, "site", "north.toml", "--exit-when-idle", "1")
    assert events(night) == ["started", "without_keys", "working", "away"]
    assert {(line["worker"], line["run"]) for line in night} == {("north", "ward")}
    assert night[-1]["event"] == "progress"
    assert night[-1]["sent"] == night[-1]["confirmed"] == night[-1]["queued"] == night[-1]["planned"]

    up = site_queues("ward", "north", 4 * 2**30).up
    with EmbeddedBroker(study / "broker").link([], 8, "somebody") as link:
        link.publish(up, PATIENT, [f"{PATIENT} {VALUE}".encode()])
        wait_until(lambda: link.receive(0.1) is not None, 30, "the confirm")
    day = log_of(study, "server", "server.toml", "--exit-when-idle", "3")
    assert events(day) == ["started", "without_keys", "active", "working", "refused", "away"]
    facts = {str(line["event"]): {n: v for n, v in line.items() if n not in STANDARD} for line in day}
    assert facts["active"] == {"fence": 2}
    assert facts["refused"] == {"number": 301, "sender": "north", "seq": None}

    log_of(study, "site", "north.toml", "--exit-when-idle", "1")
    newest = max((study / "state" / "north" / "checkpoints").iterdir())
    (newest / "tensors.safetensors").write_bytes(b"")
    again = log_of(study, "site", "north.toml", "--exit-when-idle", "1")
    assert events(again) == ["started", "without_keys", "checkpoint_skipped", "working", "away"]


def test_the_log_tells_how_a_worker_ends(study: Path) -> None:
    shutil.copy(study / FILE, study / "whole")
    table = (study / FILE).read_text()
    (study / FILE).write_text(re.sub(r"^[\d.]+", VALUE, table, flags=re.MULTILINE))
    *_, failed = log_of(study, "site", "north.toml", code=1)
    assert (failed["event"], failed["number"], failed["reason"]) == ("failed", 403, None)
    (study / FILE).unlink()
    *_, failed = log_of(study, "site", "north.toml", code=1)
    assert (failed["event"], failed["number"], failed["reason"]) == ("failed", 401, None)
    (study / "whole").rename(study / FILE)

    change(study / "south.toml", "store =", "stoer =")
    (failed,) = log_of(study, "site", "south.toml", code=1)
    assert (failed["event"], failed["number"], failed["worker"]) == ("failed", 103, None)
    assert "stoer" in str(failed["reason"])

    opens = datetime.now(UTC) + timedelta(hours=12)
    shift = f"{opens:%H:%M}-{opens + timedelta(hours=1):%H:%M} UTC"
    change(study / "north.toml", "store =", f'shift = "{shift}"\nstore =')
    waiting = begin(study, "site", "north.toml", "--log-format", "json")
    wait_until(lambda: waiting.err.exists() and waiting.err.read_text().count("\n") >= 3, 60, "three lines")
    waiting.terminate()
    _, err = end(waiting)
    lines = [json.loads(line) for line in err.splitlines()]
    assert events(lines) == ["started", "without_keys", "waiting", "stopped"]
    assert shift in lines[2]["detail"]


# ── the runbook ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """sha256 of every part of the model, trained in peace."""
    return small(tmp_path_factory.mktemp("calm") / "run", SITES[:1], 40).in_peace()


def stop_all(hospital: Hospital) -> None:
    for process in hospital.processes.values():
        process.terminate()
    for process in hospital.processes.values():
        assert process.wait(60) == 0, hospital.logs()


@pytest.mark.campaign
@pytest.mark.rabbitmq
@pytest.mark.redis
@pytest.mark.timeout(300)
def test_a_run_moves_to_another_broker_and_store_with_the_data_of_the_old_ones(
    undisturbed: dict[str, str], tmp_path: Path
) -> None:
    """As docs/how-to/operations.md says: the same name of the node, copied data, other addresses."""
    old, old_store = RabbitNode(tmp_path / "old"), RedisServer(tmp_path / "old_store")
    with old, old_store:
        hospital = small(tmp_path / "run", SITES[:1], 40, broker=old.url, store=old_store.url)
        for worker in hospital.workers:
            hospital.start(worker)
        hospital.wait_for_steps(60)
        stop_all(hospital)
        steps = hospital.steps
        old.stop()
        old_store.stop()
    new, new_store = RabbitNode(tmp_path / "new"), RedisServer(tmp_path / "new_store")
    new.name = old.name
    shutil.copytree(old.folder / "data", new.folder / "data", dirs_exist_ok=True)
    shutil.copy2(old.folder / ".erlang.cookie", new.folder)
    shutil.copytree(old_store.folder / "appendonlydir", new_store.folder / "appendonlydir")
    with new, new_store:
        try:
            for worker in hospital.workers:
                change(hospital.folder / f"{worker}.toml", f":{old.port}/", f":{new.port}/")
                change(hospital.folder / f"{worker}.toml", f":{old_store.port}/", f":{new_store.port}/")
                hospital.start(worker)
            hospital.wait_for_end()
        finally:
            hospital.close()
    assert hospital.steps > steps
    assert hospital.models() == undisturbed


@pytest.mark.timeout(300)
def test_all_of_one_moment_is_restored_and_a_store_alone_is_not_replaced(
    undisturbed: dict[str, str], tmp_path: Path
) -> None:
    hospital = small(tmp_path / "run", SITES[:1], 40)
    try:
        for worker in hospital.workers:
            hospital.start(worker)
        checkpoints = hospital.folder / "state" / "server" / "checkpoints"
        wait_until(lambda: len(list(checkpoints.glob("0*"))) == 2, 100, "two checkpoints")
        stop_all(hospital)
        shutil.copytree(hospital.folder, tmp_path / "backup")

        for file in hospital.folder.glob("run.db*"):
            file.unlink()
        before = sorted(checkpoints.iterdir())
        assert hospital.start("server").wait(60) == 1
        assert "E510 Run store lost the run" in hospital.logs()
        assert sorted(checkpoints.iterdir()) == before

        # Everything goes on for a while on the restored files, and everything is lost at once; then it is restored.
        shutil.rmtree(hospital.folder)
        shutil.copytree(tmp_path / "backup", hospital.folder)
        for worker in hospital.workers:
            hospital.start(worker)
        hospital.wait_for_steps(hospital.steps + 60)
        for worker in hospital.workers:
            hospital.kill(worker)
        shutil.rmtree(hospital.folder)
        shutil.copytree(tmp_path / "backup", hospital.folder)
        for worker in hospital.workers:
            hospital.start(worker)
        hospital.wait_for_end()
    finally:
        hospital.close()
    assert hospital.models() == undisturbed
