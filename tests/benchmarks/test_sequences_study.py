"""The study of networks that classify sequences: its data, what an ablation leaves out, what it writes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from benchmarks.accuracy import results, sequences, sequences_hippocampus, sequences_study
from benchmarks.accuracy.sequences_hippocampus import PLACES, AreaEncoder, Volume
from benchmarks.accuracy.sequences_material import Material, xor
from benchmarks.accuracy.sequences_study import Job, Study, judged, material, network
from nightsplit.shared.models.sequences import SequenceClassifier


@pytest.fixture
def volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """20 volumes of 30 slices; the bright organ of volume n is n + 2 rows high, in slices 5 to 24."""
    masks = np.zeros((600, 64, 64), np.uint8)
    for row in range(600):
        if 5 <= row % 30 < 25:
            masks[row, 20 : 22 + row // 30, 20:40] = 1
    folder = tmp_path / "hippocampus_msd"
    folder.mkdir()
    np.savez(folder / "hippocampus_2d.npz", images=60 + 120 * masks, masks=masks, volume=np.repeat(np.arange(20), 30))
    monkeypatch.setenv("NIGHTSPLIT_DATA", str(tmp_path))
    read = (material, sequences_hippocampus.division)
    for function in read:
        function.cache_clear()
    yield
    for function in read:
        function.cache_clear()


def classifier_of(job: Job) -> SequenceClassifier:
    classifier = network(job).classifier
    assert isinstance(classifier, SequenceClassifier)
    return classifier


@pytest.mark.usefixtures("volumes")
def test_labels_are_above_or_below_the_median_of_the_training_volumes() -> None:
    known = material("hippocampus", 4)
    train, test = known.train, known.test
    assert (len(train), len(test)) == (14 * len(PLACES), 6)
    assert not set(train.patients) & set(test.patients)
    median = np.median([int(name) for name in train.patients])
    for part in (train, test):
        assert part.targets.tolist() == [float(int(name) > median) for name in part.patients]
    first, last = test.patients.index(min(test.patients, key=int)), test.patients.index(max(test.patients, key=int))
    assert test.inputs[first].mean() < test.inputs[last].mean(), "a volume has its own images"


def test_frames_lie_around_the_middle_of_a_scan_and_know_nothing_of_its_length() -> None:
    def frames(slices: int, place: int) -> list[float]:
        scan = torch.arange(1.0, slices + 1)[:, None, None].expand(slices, 48, 48)
        seen = Volume(scan, scan, (48, 48), 0.0).frames(place)
        assert seen.shape == (12, 48, 48)
        return seen[:, 0, 0].tolist()

    assert frames(41, 0) == [10.0 + 2 * n for n in range(12)]
    assert frames(31, 0) == [5.0 + 2 * n for n in range(12)]
    assert frames(31, 1) == [6.0 + 2 * n for n in range(12)]
    assert frames(9, 0) == [0.0] * 4 + [2.0, 4.0, 6.0, 8.0] + [0.0] * 4, "nothing beyond the scan"


@pytest.mark.usefixtures("volumes")
def test_the_masks_of_test_volumes_are_for_their_labels_alone() -> None:
    def trained() -> dict[str, torch.Tensor]:
        return sequences_hippocampus.pretrained(seed=4, quick=True).state_dict()

    before, division = trained(), sequences_hippocampus.division(4)
    for volume in division.test.values():
        volume.masks.fill_(1)
    after = trained()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for volume in division.train.values():
        volume.masks.fill_(1)
    assert any(not torch.equal(before[name], value) for name, value in trained().items())


@pytest.mark.usefixtures("volumes")
def test_judges_of_volumes_see_what_the_encoder_says(tmp_path: Path) -> None:
    study = Study(tmp_path / "kept")
    images = material("hippocampus", 4)
    features = study.material(Job(seed=4, quick=True))
    assert features.train.inputs.shape == (14 * len(PLACES), 12, AreaEncoder.FEATURES)
    assert torch.equal(features.train.targets, images.train.targets)
    assert study.material(Job(seed=4, quick=True, without="masks")) is images
    assert isinstance(network(Job(without="masks")).encoder, AreaEncoder)
    (kept,) = (tmp_path / "kept").iterdir()
    encoder = AreaEncoder()
    encoder.load_state_dict(load_file(kept))
    with torch.no_grad():
        assert torch.equal(encoder(images.test.inputs), features.test.inputs)
        shares = encoder.shares(images.train.inputs)
    torch.testing.assert_close(encoder.mean, shares.mean((0, 1)), msg="of the training volumes")
    torch.testing.assert_close(encoder.spread, shares.std((0, 1)), msg="of the training volumes")

    (name,) = features.simple.keys() - images.simple.keys()
    middle = [features.train.inputs[1 :: len(PLACES)], features.test.inputs]
    for found, part in zip(features.simple[name], middle, strict=True):
        assert found[:, 0] == pytest.approx(part[:, :, 0].atanh().sum(1).numpy(), rel=1e-5)


@pytest.mark.parametrize(
    ("without", "silent"),
    [("LSTM", ["inputs.weight", "state.weight", "temporal.weight"]), ("weighted unit", ["spatial.weight"])],
)
def test_what_is_left_out_has_no_say(without: Literal["LSTM", "weighted unit"], silent: list[str]) -> None:
    classifier = classifier_of(Job(case="XOR of two events", without=without))
    features = torch.rand(3, 5, 32)
    before, whole = classifier(features), classifier_of(Job(case="XOR of two events"))(features)
    assert not torch.allclose(before, whole, atol=1e-4)
    weights = dict(classifier.named_parameters())
    for name in silent:
        torch.nn.init.normal_(weights[name], std=0.1)
    assert torch.allclose(classifier(features), before, atol=1e-6)


def test_votes_that_are_left_out_stay_equal() -> None:
    classifier = classifier_of(Job(without="voting"))
    assert [name for name, weight in classifier.named_parameters() if not weight.requires_grad] == ["votes"]
    assert set(classifier.get_parameter("votes").tolist()) == {0.0}


@pytest.mark.parametrize(
    ("kind", "packing"), [("polynomial", "slots"), pytest.param("one_shot", "batch", marks=pytest.mark.campaign)]
)
def test_encrypted_and_plain_judges_agree(
    kind: Literal["polynomial", "one_shot"], packing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = xor(1)
    known = Material(whole.train.select(range(256)), whole.test.select(range(70)), {})  # two ciphertexts of slots
    monkeypatch.setattr(sequences_study, "material", lambda case, seed: known)
    study, job = Study(tmp_path), Job(case="XOR of two events", network=kind)
    found = study.encrypted(job, packing)
    assert found["sequences"] == 70
    assert found["auc"] - found["auc above plain"] == pytest.approx(study.figures(job)["auc"], abs=1e-9)
    assert 0 < found["error"] < 1e-3
    assert study.encrypted(job, packing) == found, "other keys would have given another error"


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
    assert len(kept) == 2 * len(sequences.NETWORKS) + len(sequences.SETTINGS)
    assert sequences.main(arguments) == 0
    assert {path: path.stat().st_ino for path in (tmp_path / "kept").iterdir()} == kept
    assert page.read_text(encoding="utf-8") == written


class Threshold(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 100 * (images - 0.5)


def test_features_of_the_area_encoder_are_areas() -> None:
    encoder = AreaEncoder(width=4)
    encoder.network = Threshold()
    images = torch.zeros(2, 3, 16, 8)
    images[1, 2, 4:8, :2] = 1  # a quarter of the second quarter of its rows
    expected = torch.zeros(2, 3, AreaEncoder.FEATURES)
    expected[1, 2] = torch.tensor([1 / 16, 1 / 8, 0, 0, 1 / 4, 0, 0])
    torch.testing.assert_close(encoder.shares(images), expected)
    encoder.mean.fill_(1 / 16)
    encoder.spread.fill_(1 / 32)
    torch.testing.assert_close(encoder(images), torch.tanh((32 * expected - 2) / 3))


def test_the_area_encoder_encodes_a_frame_by_itself() -> None:
    torch.manual_seed(0)
    encoder = AreaEncoder(width=4)
    images = torch.randn(2, 3, 16, 16)
    features = encoder(images)
    assert features.abs().max() <= 1
    torch.testing.assert_close(encoder(images[1:, 2:])[0, 0], features[1, 2])
    features.sum().backward()
    assert all(weight.grad is not None for weight in encoder.parameters())
