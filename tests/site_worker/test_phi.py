"""Names and numbers of patients in DICOM headers: a whole night over them leaves none of them anywhere."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from tests.harness.approvals import approve_all
from tests.harness.dicom_files import write_dicom
from tests.harness.study import SITES, begin, change, contents, end, end_all, queued, write_study

PATIENTS = 50

RUN = """
[run]
id = "ward"
protocol = "split_labels"
sites = ["north", "south"]
order = "strict"
epochs = 2
window = 1000
batch_size = 4
tape = true
export_top = true
[model]
factory = "nightsplit.models:small_cnn"
settings = { width = 4 }
cut = 1
[task]
kind = "binary"
[wire]
smashed = "fp32"
[data]
image_size = 16
classes = ["well", "ill"]
"""


def identifiers(number: int) -> dict[str, str]:
    """What a header says of a patient, by keyword; no text of it occurs by chance."""
    mark = hashlib.sha256(f"patient {number}".encode()).hexdigest()[:10].upper()
    return {
        "PatientName": f"Doe{mark}^Jane",
        "PatientID": f"MRN{mark}",
        "OtherPatientNames": f"Roe{mark}^Joan",
        "PatientAddress": f"{mark} Harbour Street",
        "PatientTelephoneNumbers": f"555{mark}",
        "PatientBirthName": f"Maiden{mark}",
        "AccessionNumber": f"ACC{mark}",
        "ReferringPhysicianName": f"Dr{mark}",
        "InstitutionName": f"Ward{mark}",
        "PatientComments": f"Comment{mark}",
        "SeriesInstanceUID": f"1.2.{int(mark, 16)}",
        "StudyInstanceUID": f"1.3.{int(mark, 16)}",
    }


PRIVATE, NESTED = "private", "nested"


@pytest.fixture(scope="module")
def strings() -> list[str]:
    """Every text that was seeded, its parts in front of a caret too."""
    texts: list[str] = []
    for number in range(PATIENTS):
        texts += identifiers(number).values()
        texts += [f"{where}{number}-{identifiers(number)['PatientID']}" for where in (PRIVATE, NESTED)]
    return [*texts, *(text.partition("^")[0] for text in texts if "^" in text)]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A study whose sites read DICOM folders, 25 patients each."""
    folder = write_study(tmp_path / "study")
    (folder / "patients.csv").unlink()
    (folder / "run.toml").write_text(RUN)
    (folder / "policy.toml").write_text('allowed = ["labels", "stored_activations", "counts"]\ntape = true\n')
    approve_all(folder)
    chance = random.Random(3)
    for number in range(PATIENTS):
        site = SITES[number % 2]
        group = Dataset()
        block = group.private_block(0x0011, "HOSPITAL", create=True)
        mine = identifiers(number)["PatientID"]
        block.add_new(0x01, "LO", f"{PRIVATE}{number}-{mine}")
        nested = Dataset()
        nested.RequestedProcedureDescription = f"{NESTED}{number}-{mine}"
        group.RequestAttributesSequence = Sequence([nested])
        group.RequestedProcedureDescription = identifiers(number)["PatientComments"]
        bright = 300 * (number % 4 > 1)
        pixels = np.array([[chance.randrange(700) + bright for _ in range(16)] for _ in range(16)], dtype=np.int16)
        kind = "ill" if bright else "well"
        header = {**identifiers(number), "RescaleIntercept": "-1024", "RescaleSlope": "1"}
        write_dicom(folder / f"pacs_{site}" / kind / f"{number}.dcm", pixels, group, **header)
    for site in SITES:
        change(folder / f"{site}.toml", 'source = "table"', 'source = "dicom"')
        change(folder / f"{site}.toml", 'path = "patients.csv"', f'path = "pacs_{site}"')
        share = "[0.0, 0.5]" if site == "north" else "[0.5, 1.0]"
        change(folder / f"{site}.toml", f"share = {share}\n", "")
    yield folder
    end_all()


def found(strings: Iterable[str], where: Iterable[bytes]) -> int:
    """How many of the texts occur, in any case, as UTF-8 or UTF-16."""
    whole = b"\0".join(where).lower()
    return sum(text.lower().encode() in whole or text.lower().encode("utf-16-le") in whole for text in strings)


@pytest.mark.timeout(300)
def test_no_header_text_leaves_the_reader(folder: Path, strings: list[str]) -> None:
    pacs = [contents(folder / f"pacs_{site}") for site in SITES]
    assert sum(map(len, pacs)) == PATIENTS
    assert found(strings, (content for site in pacs for content in site.values())) == len(set(strings)) == len(strings)

    said: list[str] = []
    said += end(begin(folder, "open", "server.toml"))
    for site in SITES:
        said += end(begin(folder, "site", f"{site}.toml", "--exit-when-idle", "1"))

    said += end(begin(folder, "doctor", "south.toml"))

    # The messages of a night wait: nobody has taken them.
    assert all((queued(folder, site) or 0) > 5 for site in SITES)
    messages = contents(folder / "broker")
    assert sum(map(len, messages.values())) > 100_000
    assert found(strings, messages.values()) == 0

    workers = [begin(folder, "server", "server.toml", "--log-format", "json")]
    workers += [begin(folder, "site", f"{site}.toml", "--log-format", "json") for site in SITES]
    for worker in workers:
        said += end(worker)
    said += end(begin(folder, "predict", "north.toml"))

    everything = contents(folder)
    pictures = {name for name in everything if name.startswith("pacs_")}
    left = {name: content for name, content in everything.items() if name not in pictures}
    for part in ("broker/", "state/server/checkpoints/", "state/north/checkpoints/", "state/north/model/", "report/"):
        assert any(name.startswith(part) for name in left), part
    assert any("tape" in name for name in left)
    assert "run.db" in left
    assert found(strings, left.values()) == 0
    assert found(strings, (text.encode() for text in said)) == 0
    assert any('"event"' in text for text in said)
