"""The sets of the HE-CLSTM paper, as docs/reference/data.md has them read: small images in the same layout."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nightsplit.shared.config.run import DataSection, TaskSection
from nightsplit.site_worker.config import SourceSection
from nightsplit.site_worker.data.dataset import Dataset
from nightsplit.site_worker.data.source import load_dataset

DATA_PAGE = Path(__file__).parents[2] / "docs" / "reference" / "data.md"
PAGE = DATA_PAGE.read_text(encoding="utf-8").partition("## BreaKHis")[2]
FRAMES = 3


def write_image(path: Path, grey: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((20, 30), grey, dtype=np.uint8)).save(path)


def loaded(source: SourceSection, base: Path, classes: tuple[str, ...] | None = None) -> Dataset:
    data = DataSection(image_size=16, frames=FRAMES, classes=classes)
    return load_dataset(source, data, TaskSection(kind="binary"), base)


@pytest.fixture
def breakhis(tmp_path: Path) -> Path:
    """Four slides at two magnifications; a piece of one patient has a slide of its own."""
    root = tmp_path / "BreaKHis_v1"
    slides = [("benign", "B_A", "14-22549AB"), ("benign", "B_F", "14-9133"), ("malignant", "M_DC", "14-2523"),
              ("malignant", "M_DC", "14-2523CD")]  # fmt: skip
    for kind, letters, slide in slides:
        for zoom in (40, 100):
            folder = root / "histology_slides" / "breast" / kind / "SOB" / f"SOB_{letters}_{slide}" / f"{zoom}X"
            for number in range(1, FRAMES + 2):
                write_image(folder / f"SOB_{letters}-{slide}-{zoom}-{number:03}.png", 10 * number + zoom)
    return root


def test_breakhis(breakhis: Path) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    subprocess.run([sys.executable, "-c", snippet], cwd=breakhis, check=True)
    source = SourceSection(
        source="images", path="BreaKHis_v1", index="index.csv", patient="patient", where={"zoom": ("100",)}
    )
    found = loaded(source, breakhis.parent, ("B", "M"))
    assert found.inputs.shape == (4, FRAMES, 16, 16), "a sequence for each slide, of one magnification"
    assert sorted(found.targets.tolist()) == [0, 0, 1, 1]
    assert len(set(found.patients)) == 3, "two pieces of one patient stay together"


def test_cervigram(tmp_path: Path) -> None:
    (lines,) = re.findall(r"```\nindex\.csv +(.*?)```", PAGE, re.DOTALL)
    heading, *examples = [line.strip() for line in lines.strip().splitlines()]
    assert [line.count(",") for line in examples] == [heading.count(",")] * len(examples)
    rows = [heading]
    for patient, ill in (("0171", 1), ("0172", 0)):
        for second in (0, 60, 120):
            name = f"{patient}/visit2-{second}.jpg"
            write_image(tmp_path / "cervix" / name, 200 - second)
            rows.append(f"{name},{ill},{patient},{patient}-visit2,{second}")
    (tmp_path / "cervix" / "index.csv").write_text("\n".join(rows) + "\n")
    source = SourceSection(source="images", path="cervix", index="index.csv", patient="patient")
    found = loaded(source, tmp_path)
    assert found.inputs.shape == (2, FRAMES, 16, 16)
    brightness = found.inputs.mean((2, 3))
    assert bool((brightness[:, :-1] > brightness[:, 1:]).all()), "frames in the order of their seconds"
    assert set(zip(found.patients, found.targets.tolist(), strict=True)) == {("0171", 1.0), ("0172", 0.0)}
