"""The study of Dice under differential privacy runs from data to table and picture, and goes on where it stopped."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.accuracy import segmentation
from benchmarks.accuracy.segmentation import BEGIN, END, SITES, mean_mask, read_volumes
from nightsplit.site_worker.data.dataset import Dataset, Splits

CHOSEN = ["public volumes alone", "centralized", "FedAvg", "DP, epsilon 8"]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two slices of each of 260 volumes: a bright disc, which is the foreground, at a place of its own."""
    chance = np.random.default_rng(0)
    y, x = np.mgrid[:16, :16]
    centres = chance.uniform(6, 10, (520, 2))
    masks = np.stack([((y - a) ** 2 + (x - b) ** 2 < 9) for a, b in centres]).astype(np.uint8)
    images = (masks * 150 + chance.integers(0, 60, masks.shape)).astype(np.uint8)
    folder = tmp_path / "data" / "hippocampus_msd"
    folder.mkdir(parents=True)
    np.savez(folder / "hippocampus_2d.npz", images=images, masks=masks, volume=np.repeat(np.arange(260), 2))
    monkeypatch.setenv("NIGHTSPLIT_DATA", str(tmp_path / "data"))
    return tmp_path


def test_no_volume_is_in_two_places(data: Path) -> None:
    parts, public = read_volumes()
    groups = [set(public.patients)]
    for site in SITES:
        groups += [set(part.patients) for part in (parts[site].train, parts[site].validation, parts[site].test)]
    assert [len(group) for group in groups] == [20, 59, 8, 13, 59, 8, 13, 59, 8, 13]
    assert len(set().union(*groups)) == 260


def test_a_study_goes_on_where_it_stopped(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "results.md").write_text(f"before\n{BEGIN}\nold\n{END}\nbehind\n")
    rows = [part for name in CHOSEN for part in ("--row", name)]
    arguments = [*rows, "--quick", "--write", "--folder", str(data / "kept"), "--docs", str(data)]
    assert segmentation.main(arguments) == 0
    page = (data / "results.md").read_text()
    assert page.startswith(f"before\n{BEGIN}\n")
    assert page.endswith(f"{END}\nbehind\n")
    assert "old" not in page
    assert [name for name in CHOSEN if f"| {name} |" not in page] == []
    assert (data / "segmentation.png").stat().st_size > 1000
    first, *others, last = sorted((data / "kept").glob("*.json"))
    assert len(others) == len(CHOSEN) - 2
    # A figure that no training gives: what is in the folder is believed, and what is missing is trained again.
    first.write_text(json.dumps({**json.loads(first.read_text()), "test": 7.0}))
    last.unlink()
    assert segmentation.main(arguments) == 0
    assert capsys.readouterr().out.count("| 7.000 |") == 1
    assert last.exists()


def test_mean_mask_of_masks_that_are_all_alike_is_right() -> None:
    mask = torch.zeros(6, 8, 8)
    mask[:, 2:5, 3:6] = 1.0
    one = Dataset(torch.zeros(6, 1, 8, 8), mask, ("a", "a", "b", "b", "c", "c"))
    figures = mean_mask({site: Splits(one, one, one) for site in SITES})
    assert figures.pooled["dice"] == 1.0
