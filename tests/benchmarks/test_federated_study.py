"""The study of fedavg_transfer and data_vectors: what it writes, that it goes on, and how it divides patients."""

import os
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks.accuracy import federated, results
from benchmarks.accuracy.divisions import DIVISIONS, IID, divide, keep
from nightsplit.site_worker.data.dataset import Dataset, Splits

SITES = ["north", "south", "east"]
needs_data = pytest.mark.skipif(
    "NIGHTSPLIT_DATA" not in os.environ,
    reason="NIGHTSPLIT_DATA is not set: the public data sets are not here",
)


def dataset(patients: int, first: int = 0) -> Dataset:
    """Two rows per patient, every third patient ill; inputs number the rows."""
    names = tuple(f"patient {first + row // 2}" for row in range(2 * patients))
    ill = torch.tensor([float(row // 2 % 3 == 0) for row in range(2 * patients)])
    return Dataset(torch.arange(2.0 * patients).reshape(-1, 1) + 2 * first, ill, names)


def whole() -> Splits:
    return Splits(dataset(240), dataset(30, first=240), dataset(60, first=270))


def ill(data: Dataset) -> float:
    return data.targets.mean().item()


@pytest.mark.parametrize("division", DIVISIONS)
@pytest.mark.parametrize("seed", [1, 2])
def test_every_patient_goes_to_one_site_with_all_its_rows(division: str, seed: int) -> None:
    parts = divide(whole(), SITES, division, seed)
    for name in ("train", "validation", "test"):
        among, together = [getattr(parts[site], name) for site in SITES], getattr(whole(), name)
        of_site = [set(part.patients) for part in among]
        assert sum(len(names) for names in of_site) == len(set.union(*of_site)) == len(set(together.patients))
        assert sum(len(part) for part in among) == len(together)
        rows = torch.cat([part.inputs for part in among]).flatten().sort().values
        assert torch.equal(rows, together.inputs.flatten())


@pytest.mark.parametrize("division", DIVISIONS)
def test_held_out_patients_are_divided_alike_however_training_patients_are(division: str) -> None:
    parts, iid = divide(whole(), SITES, division, 1), divide(whole(), SITES, IID, 1)
    assert [parts[site].test.patients for site in SITES] == [iid[site].test.patients for site in SITES]
    assert {len(part.test) for part in parts.values()} == {40}


def test_sizes_and_shares_of_the_ill_differ_as_the_division_says() -> None:
    for seed in range(5):
        even = divide(whole(), SITES, IID, seed)
        assert [len(even[site].train) for site in SITES] == [160] * 3
        assert max(ill(part.train) for part in even.values()) < 0.35
        sizes = [len(part.train) for part in divide(whole(), SITES, "sizes 8:1:1", seed).values()]
        assert sizes == [384, 48, 48]
        assert min(len(part.train) for part in divide(whole(), SITES, "Dirichlet 0.1", seed).values()) >= 16

    def skew(division: str) -> float:
        return sum(
            max(shares) - min(shares)
            for seed in range(20)
            for shares in [[ill(part.train) for part in divide(whole(), SITES, division, seed).values()]]
        )

    assert skew(IID) < skew("Dirichlet 1.0") < skew("Dirichlet 0.1")


def test_a_larger_share_keeps_whom_a_smaller_one_keeps_of_every_class() -> None:
    train = whole().train
    some, more = keep(train, 0.1, 1), keep(train, 0.25, 1)
    assert set(some.patients) < set(more.patients) < set(keep(train, 1.0, 1).patients) == set(train.patients)
    assert Counter(some.targets.tolist()) == {0.0: 32, 1.0: 16}
    assert set(keep(train, 0.1, 2).patients) != set(some.patients)
    assert set(keep(train, 0.001, 1).targets.tolist()) == {0.0, 1.0}


@needs_data
def test_a_quick_study_writes_its_tables_between_its_marks_and_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "results.md"
    page.write_text(f"before\n\n{federated.BEGIN}\nold\n{results.END}\n\nafter\n", encoding="utf-8")
    monkeypatch.setattr(results, "PAGE", page)
    arguments = ["--quick", "--write", "--keep", str(tmp_path), "--table", "divisions", "--table", "vectors"]
    assert federated.main(arguments) == 0
    written = page.read_text(encoding="utf-8")
    assert written.startswith("before\n")
    assert written.endswith(f"{results.END}\n\nafter\n")
    assert "old" not in written
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|", written, re.MULTILINE))
    assert {*DIVISIONS, "centralized", "north alone", "all data", "one-shot mean", "merged", "random vectors"} <= {
        *rows
    }
    for row in (*DIVISIONS, "merged", "random vectors"):
        assert 0 <= float(rows[row]) <= 1
    assert "lung_ct: merged at most 3 below all data" in rows

    figures = tmp_path / "figures.json"
    before = figures.stat()
    capsys.readouterr()
    assert federated.main(arguments) == 0
    assert page.read_text(encoding="utf-8") == written
    assert figures.stat().st_ino == before.st_ino, "nothing was trained again"
