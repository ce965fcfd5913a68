"""The study of networks that judge sequences: its data, what an ablation leaves out, what it writes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from benchmarks import results, sequences
from benchmarks.sequences_study import PLACES, Job, judged, material, network
from shared.models.sequences import SequenceJudge


@pytest.fixture
def volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """20 volumes of 10 slices; the organ of volume n, and its brightness, grow with n."""
    masks = np.zeros((200, 64, 64), np.uint8)
    for row in range(200):
        masks[row, 20 : 22 + row // 10, 20:40] = 1
    names = np.repeat(np.arange(20), 10)
    images = masks * (50 + 10 * names).astype(np.uint8)[:, None, None]
    folder = tmp_path / "hippocampus_msd"
    folder.mkdir()
    np.savez(folder / "hippocampus_2d.npz", images=images, masks=masks, volume=names)
    monkeypatch.setenv("NIGHTSPLIT_DATA", str(tmp_path))
    material.cache_clear()
    yield
    material.cache_clear()


def judge_of(job: Job) -> SequenceJudge:
    judge = network(job).judge
    assert isinstance(judge, SequenceJudge)
    return judge


@pytest.mark.usefixtures("volumes")
def test_labels_are_above_or_below_the_median_of_the_training_volumes() -> None:
    known = material("hippocampus", seed=4)
    train, test = known.train, known.test
    assert (len(train), len(test)) == (14 * PLACES, 6)
    assert not set(train.patients) & set(test.patients)
    median = np.median([int(name) for name in train.patients])
    for part in (train, test):
        assert part.targets.tolist() == [float(int(name) > median) for name in part.patients]
    first, last = test.patients.index(min(test.patients, key=int)), test.patients.index(max(test.patients, key=int))
    assert test.inputs[first].mean() < test.inputs[last].mean(), "a volume has its own images"


@pytest.mark.parametrize(
    ("without", "silent"),
    [("LSTM", ["inputs.weight", "state.weight", "temporal.weight"]), ("weighted unit", ["spatial.weight"])],
)
def test_what_is_left_out_has_no_say(without: Literal["LSTM", "weighted unit"], silent: list[str]) -> None:
    judge = judge_of(Job(case="XOR of two events", without=without))
    features = torch.rand(3, 5, 32)
    before, whole = judge(features), judge_of(Job(case="XOR of two events"))(features)
    assert not torch.allclose(before, whole, atol=1e-4)
    weights = dict(judge.named_parameters())
    for name in silent:
        torch.nn.init.normal_(weights[name], std=0.1)
    assert torch.allclose(judge(features), before, atol=1e-6)


def test_votes_that_are_left_out_stay_equal() -> None:
    judge = judge_of(Job(without="voting"))
    assert [name for name, weight in judge.named_parameters() if not weight.requires_grad] == ["votes"]
    assert set(judge.get_parameter("votes").tolist()) == {0.0}


def test_figures_of_known_scores() -> None:
    truth = np.array([0.0] * 10 + [1.0] * 10, np.float32)
    scores = np.array([-2.0] * 8 + [-0.5, 3.0] + [-3.0] + [-1.0] * 3 + [1.0] * 6)
    found = judged(truth, scores)
    assert found["auc"] == pytest.approx((8 * 3 + 9 * 6) / 100)
    assert found["sensitivity"] == 0.6, "above the second highest of the healthy"
    at = [found[f"{name} at {weight}"] for weight in (1, 4) for name in ("sensitivity", "specificity")]
    assert at == pytest.approx([0.6, 0.9, 0.9, 0.8])
    assert found["balanced accuracy"] == pytest.approx(0.75)


def test_a_quick_study_writes_its_tables_and_trains_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "results.md"
    page.write_text(f"before\n\n{sequences.BEGIN}\nold\n{results.END}\n\nafter\n", encoding="utf-8")
    monkeypatch.setattr(results, "PAGE", page)
    arguments = ["--quick", "--write", "--case", "XOR of two events", "--keep", str(tmp_path / "kept")]
    assert sequences.main(arguments) == 0
    written = page.read_text(encoding="utf-8")
    assert written.startswith("before\n")
    assert written.endswith(f"{results.END}\n\nafter\n")
    assert "old" not in written
    assert [name for name in sequences.NETWORKS if f"\n| {name} | 0." not in written] == []

    kept = {path: path.stat().st_ino for path in (tmp_path / "kept").iterdir()}
    assert len(kept) == 2 * len(sequences.NETWORKS)
    assert sequences.main(arguments) == 0
    assert {path: path.stat().st_ino for path in (tmp_path / "kept").iterdir()} == kept
    assert page.read_text(encoding="utf-8") == written
