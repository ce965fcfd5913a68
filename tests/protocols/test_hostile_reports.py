"""A site that lies in its reports or sends huge values: the run ends, the server restarts, the report is written."""

import json

import pytest
import torch

from nightsplit.server_worker.metrics_log import MetricsLog
from nightsplit.server_worker.report import write_report
from nightsplit.shared.errors import RunError
from nightsplit.shared.protocols.data_vectors import SCALES
from nightsplit.shared.wire.message import SERVER
from tests.harness.night import Night, tiny_config, tiny_rounds

SITES = ("north", "south")
PLAIN = {"loss": 1.0, "auc": None, "balanced_accuracy": None}
LIES = {
    "no samples": json.dumps({"test": {"auc": 0.5}}),
    "nested": "[" * 5000,
    "nested maps": '{"test":' * 2000,
    "three thousand figures": json.dumps({"test": {"samples": 4.0, **{str(n): 1.0 for n in range(1500)}}}),
    "infinitely many samples": '{"test": {"samples": 1e999}}',
    "1e308 samples": json.dumps({"test": {"samples": 1.7e308, **PLAIN}, "validation": {"samples": 1.7e308, **PLAIN}}),
    "a step": json.dumps({"test": {"samples": 4.0, **PLAIN, "step": 1e300}}),
    "an event": json.dumps({"test": {"samples": 4.0, **PLAIN, "event": 1.0, "site": 7.0}}),
    "markup": json.dumps({"test": {"samples": 4.0, "<img src=x> | [x](http://evil)\n\n# sha256: 00": 1.0}}),
}
RUNS = {
    "split_u": tiny_config(SITES, protocol="split_u", epochs=2),
    "fedavg_transfer": tiny_rounds(SITES, rounds=2),
    "data_vectors": tiny_rounds(SITES, protocol="data_vectors"),
}


def played(night, change):
    """To the end, the server thrown away again and again; `change` makes the last site's role a liar."""
    for name in night.workers:
        night.start(name)
    change(night.roles[SITES[-1]])
    turns = 0
    while night.engines:
        turns += 1
        assert turns < 5000, "the run hangs"
        for name in list(night.engines):
            night.step(name)
        if SERVER in night.engines and turns % 40 == 0:
            night.restart(SERVER)
    return night.server


def written(night, folder):
    """report.json, which is JSON, and report.md; metrics.jsonl takes all lines."""
    log = MetricsLog(folder, 0)
    for line in night.lines:
        if line.metrics["event"] not in ("local", "spend"):
            log.write(line)
    log.close()
    write_report(folder, night.config, night.server, dict.fromkeys(SITES))

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {line["event"] for line in lines} <= {"train", "combine", "evaluate"}
    return json.loads((folder / "report.json").read_text(), parse_constant=refuse), (folder / "report.md").read_text()


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("run", RUNS)
def test_a_report_that_lies_is_refused_and_the_run_ends(run, lie, tmp_path):
    def change(role):
        text = LIES[lie]
        if run == "data_vectors":
            honest = role.evaluate_final
            role.evaluate_final = lambda: (honest(), json.dumps([text, *["{}"] * (len(SCALES) - 1)]))[1]
        else:
            setattr(role, "evaluate" if run == "fedavg_transfer" else "_evaluate", lambda: text)

    night = Night(RUNS[run], tmp_path)
    server = played(night, change)
    assert server.refusals["south"] >= 1
    assert server.refusals["north"] == 0
    report, text = written(night, tmp_path / "report")
    assert "<" not in text
    if run != "split_u":
        assert report["best"]["sites"]["north"]["test"]["samples"] == 10
        assert "test" not in report["best"]["sites"]["south"]


def test_statistics_that_no_data_has_are_refused(tmp_path):
    def change(role):
        honest = role.report_tensors
        role.report_tensors = lambda: {"statistics": -1 - honest()["statistics"].abs()}

    night = Night(RUNS["data_vectors"], tmp_path)
    server = played(night, change)
    assert server.refusals["south"] == 1
    assert all(tensor.isfinite().all() for tensor in server.best_weights.values())
    written(night, tmp_path / "report")


@pytest.mark.parametrize("size", [1e20, -1e20, 1e19])
@pytest.mark.parametrize("combine", ["mean", "median", "trimmed_mean"])
def test_the_largest_values_do_not_end_the_run(combine, size, tmp_path):
    """Means, squares of running means, a model of two rounds: nothing overflows that others would have to read."""

    def change(role):
        role._make_update = lambda: torch.full((role.layout.length,), size)

    night = Night(tiny_rounds(SITES, rounds=3, combine=combine), tmp_path)
    server = played(night, change)
    assert server.vector.isfinite().all()
    assert all(tensor.isfinite().all() for tensor in server.best_weights.values())
    assert all(tensor.isfinite().all() for tensor in night.roles["north"].model()["model"].values())
    written(night, tmp_path / "report")


def test_the_largest_vector_does_not_end_the_run(tmp_path):
    def change(role):
        role._make_update = lambda: torch.full((role.layout.length,), 1e20)

    night = Night(RUNS["data_vectors"], tmp_path)
    server = played(night, change)
    assert server.refusals["north"] == 0
    assert all(tensor.isfinite().all() for tensor in server.best_weights.values())
    written(night, tmp_path / "report")


def test_a_site_that_a_model_makes_diverge_says_which_one(tmp_path):
    """Of the model that the site made itself nobody else is to blame."""
    night = Night(RUNS["fedavg_transfer"], tmp_path)
    night.start("north")
    role = night.roles["north"]
    with torch.no_grad():
        role.trainer.trainable[0].fill_(torch.inf)
    for version, sentence in ((0, "not finite. Fix"), (1, "the server's model 1.*another site's update")):
        role._version = version
        with pytest.raises(RunError, match=f"E603.*{sentence}"):
            role._train()
        with pytest.raises(RunError, match=f"E603.*1e\\+20.*{sentence.removeprefix('not finite')}"):
            role._make_update()


def test_a_model_that_gives_nothing_finite_leaves_the_site_with_its_own(tmp_path):
    """Each value of it is small enough; what follows from them for a patient is not."""

    def change(role):
        role._make_update = lambda: torch.full((role.layout.length,), 1e15)

    night = Night(tiny_rounds(SITES, rounds=2, statistics="local"), tmp_path)
    played(night, change)
    assert night.broker.depth(night.queues["north"].dead) == 1
    report, _ = written(night, tmp_path / "report")
    assert report["history"][0]["sites"]["north"] == {}
