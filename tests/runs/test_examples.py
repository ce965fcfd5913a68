"""The examples: their files agree with each other, and the demo plays one for real."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
from msgspec.structs import replace

from nightsplit.console.demo.baselines import centralized
from nightsplit.console.demo.demo import EXAMPLES, compare_weights, run_demo
from nightsplit.console.ui.text import screen
from nightsplit.server_worker.worker import ServerWorker
from nightsplit.shared.config.load import load
from nightsplit.shared.errors import ConfigError, DataError
from nightsplit.shared.models.hashing import weights_sha256
from nightsplit.shared.protocols.build import build_model
from nightsplit.shared.protocols.load import load_run
from nightsplit.shared.protocols.spec import Shape, systems
from nightsplit.simulation.run import Simulation
from nightsplit.site_worker.config import PolicyConfig
from nightsplit.site_worker.worker import SEED, SiteWorker
from tests.harness.approvals import approve_all
from tests.harness.services import RabbitNode, RedisServer

IN_ROUNDS = ["data_vectors", "dp_segmentation", "fedavg_transfer"]
ENCRYPTED = "encrypted_sequences"
NAMES = sorted(["cholesterol", "heart", "lung_ct", "radiograph", *IN_ROUNDS, ENCRYPTED])


def test_every_example_is_tested() -> None:
    assert sorted(path.parent.name for path in EXAMPLES.glob("*/run.toml")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_its_files_agree(name: str, tmp_path: Path) -> None:
    folder = shutil.copytree(EXAMPLES / name, tmp_path / name)
    approve_all(folder)
    config = load_run(folder / "run.toml")
    files = {path.stem for path in folder.glob("*.toml")} - {"run", "server", "policy", "pretrain", "approved"}
    assert files == set(config.run.sites)
    server = ServerWorker(folder / "server.toml")
    workers = [SiteWorker(folder / f"{site}.toml") for site in config.run.sites]  # also asks policy and approvals
    assert [worker.config.name for worker in workers] == config.run.sites
    assert {worker.config.broker for worker in workers} == {server.config.broker}
    assert {worker.config.store for worker in workers} == {server.config.store}
    assert len({worker.config.state for worker in [server, *workers]}) == len(workers) + 1
    assert load(folder / "policy.toml", PolicyConfig).min_batch > 1
    assert (folder / "README.md").is_file()


@pytest.mark.parametrize(
    ("name", "protocol"),
    [
        (name, protocol)
        for name in NAMES
        for protocol in (
            systems(Shape.ROUND) if name in [*IN_ROUNDS, ENCRYPTED] else systems(Shape.STREAM, Shape.ROUND)
        )
    ],
)
def test_its_model_fits_its_task_in_every_system_of_its_shape(name: str, protocol: str) -> None:
    config = load_run(EXAMPLES / name / "run.toml")
    config = replace(config, run=replace(config.run, protocol=protocol))
    assembly = build_model(config, EXAMPLES / name)  # an output that does not fit is refused
    assert sum(weights.numel() for part in assembly.modules.values() for weights in part.parameters()) > 100


@pytest.mark.parametrize("name", ["heart", "lung_ct", "radiograph", *IN_ROUNDS])
def test_without_the_data_it_says_where_they_are(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NIGHTSPLIT_DATA", raising=False)
    folder = shutil.copytree(EXAMPLES / name, tmp_path / name)
    approve_all(folder)
    sites = load_run(folder / "run.toml").run.sites
    for site in sites:
        with pytest.raises(DataError, match=r"E408 .*download .* https?://.*set NIGHTSPLIT_DATA"):
            SiteWorker(folder / f"{site}.toml").load_splits()


def test_without_the_data_nothing_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NIGHTSPLIT_DATA", raising=False)
    with pytest.raises(DataError, match=r"E408 .*Task04_Hippocampus from http://medicaldecathlon.com.*NIGHTSPLIT_DATA"):
        runpy.run_path(str(EXAMPLES / ENCRYPTED / "prepare.py"), run_name="__main__")
    assert not (EXAMPLES / ENCRYPTED / "frames").exists()


@pytest.mark.campaign
@pytest.mark.timeout(400)
def test_the_demo_plays_nights_and_days_to_the_result_of_one_undisturbed_night(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_demo(Path("cholesterol"), as_json=True) == 0
    shown = json.loads(capfd.readouterr().out)
    work, killed = sorted((tmp_path / "runs").iterdir())
    assert killed.name.startswith("demo-killed-")
    assert (shown["kills"], shown["sha256_equal"], shown["sha256_killed"]) == (2, True, shown["sha256"])
    reports = [json.loads((folder / "report" / "report.json").read_text(encoding="utf-8")) for folder in (work, killed)]
    assert [report["top_sha256"] for report in reports] == [shown["sha256"], shown["sha256_killed"]]
    assert "sha256 of the server's half" in (work / "report" / "report.md").read_text(encoding="utf-8")

    config = load_run(work / "run.toml")
    parts = {site: SiteWorker(work / f"{site}.toml").load_splits() for site in config.run.sites}
    undisturbed = Simulation(config, parts, tmp_path / "undisturbed")
    undisturbed.seeds = {site: (SiteWorker(work / f"{site}.toml").state_folder / SEED).read_bytes() for site in parts}
    undisturbed.run()
    assert shown["sha256"] == weights_sha256(undisturbed.server.best_weights)
    figures = undisturbed.evaluate()
    assert shown["split_all_mae"] == pytest.approx(figures.overall["mae"], rel=1e-3)
    assert shown["centralized_all_r2"] == centralized(config, parts).overall["r2"]
    assert shown["split_all_r2"] > 0.97
    for site in ("south", "east"):  # north has half of all patients, and needs nobody
        assert shown["split_all_mae"] < 0.8 * shown[f"{site}_alone_all_mae"]


AVERAGED = """
[run]
id = "lipids"
protocol = "fedavg_dp_seg"
sites = ["north", "south", "east"]
order = "strict"
[round]
rounds = 3
[privacy]
epsilon = 8.0
delta = 1e-3
clip = 1.0
[model]
factory = "nightsplit.models:mlp"
settings = { inputs = 3, hidden = [16], outputs = 1 }
[task]
kind = "regression"
[data]
features = ["tc", "hdl", "ltg"]
scaling = "run"
mean = [189.0, 49.8, 4.64]
spread = [34.6, 12.9, 0.52]
target_mean = 115.0
target_spread = 30.0
"""


@pytest.fixture
def averaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An example of averaging with noise, with the data of the cholesterol example."""
    example = tmp_path / "averaged"
    shutil.copytree(EXAMPLES / "cholesterol", example)
    (example / "run.toml").write_text(AVERAGED)
    (example / "policy.toml").write_text('allowed = ["weights", "counts"]\nserver_sets_weights = true\n')
    for site in load_run(example / "run.toml").run.sites:
        file = example / f"{site}.toml"
        file.write_text(file.read_text().replace("[site]\n", f'[site]\nledger = "{site}.db"\n'))
    monkeypatch.chdir(tmp_path)
    return example


@pytest.mark.campaign
@pytest.mark.timeout(400)
def test_the_demo_plays_rounds_and_draws_the_same_noise_after_kills(
    averaged: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_demo(averaged, as_json=True) == 0
    shown = json.loads(capfd.readouterr().out)
    assert (shown["kills"], shown["sha256_equal"]) == (2, True)
    assert {"federated_noise_all_mae", "centralized_all_mae", "east_alone_north_mae"} <= shown.keys()


@pytest.mark.campaign
@pytest.mark.rabbitmq
@pytest.mark.redis
@pytest.mark.timeout(400)
def test_the_demo_plays_at_a_broker_and_a_store_of_the_user(
    averaged: Path, rabbitmq: RabbitNode, redis_server: RedisServer, capfd: pytest.CaptureFixture[str]
) -> None:
    """The broker may know the example's run: every play has an id of its own."""
    assert run_demo(averaged, as_json=True, at=(rabbitmq.vhost(), redis_server.url)) == 0
    shown = json.loads(capfd.readouterr().out)
    assert shown["run"].startswith("lipids-")
    assert shown["sha256_killed"] is None


def test_the_demo_says_so_when_the_two_plays_end_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    before = {"server": "ab" * 32, "north": "cd" * 32, "south": "ef" * 32}
    assert compare_weights(before, dict(before), 2, screen(), "the server's half of the model") is True
    assert capsys.readouterr().out.splitlines()[1:] == [
        "sha256 of the server's half of the model",
        f"  nights and days   {'ab' * 32}",
        f"  2 kills           {'ab' * 32}",
        "  bit-identical, as are the parts of north, south",
    ]
    assert compare_weights(before, {**before, "south": "00" * 32}, 2, screen(), "the model") is False
    assert "NOT EQUAL: the parts of south differ. " in capsys.readouterr().out


def test_an_unknown_example_is_told_with_those_that_there_are() -> None:
    with pytest.raises(
        ConfigError,
        match=r"E110 .*cholesterol, data_vectors, dp_segmentation, encrypted_sequences, fedavg_transfer, heart",
    ):
        run_demo(Path("examples/liver"), as_json=False)
