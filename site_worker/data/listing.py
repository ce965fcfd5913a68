"""The files of a folder, with label and patient from an index or from the folders' names.

With an index (a CSV with a `file` column) label and patient are columns of it. Without one:

    covid/scan7.png                                   label: a folder named after a class
    patient00005/study1_positive/image1.png           label: a folder that ends in _<class> (MURA)

and the patient is the nearest folder named patient*, else every file is a patient.

A folder that bears a class's name counts before a folder that merely ends in it.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from nightsplit.shared.errors import DataError
from nightsplit.site_worker.config import SourceSection
from nightsplit.site_worker.data.cells import read_cells
from nightsplit.site_worker.data.rows import absent, plain


@dataclass(frozen=True)
class Listing:
    """Files and what is known of each of them.

    Attributes:
        source: the index, or the folder without one.
        base: folder that `files` are relative to.
        files: in the order of the index, or sorted.
        columns: cells as text, one per file.
        patient: column of the patient; None: nothing says who it is.
        place: where a file is listed, for people.
    """

    source: Path
    base: Path
    files: list[str]
    columns: dict[str, list[str]]
    patient: str | None
    place: Callable[[int], str]

    def listed(self, i: int) -> str:
        """ ", listed in index.csv, line 7", for the end of a sentence; nothing where no index lists files."""
        return "" if self.source == self.base else f", listed in {self.place(i)}"


def list_files(
    folder: Path, source: SourceSection, classes: Collection[str], wanted: Callable[[Path], bool], kind: str
) -> Listing:
    """The files that the index lists, or that are in the folder.

    Args:
        source: `index`, `label` and `patient` (without an index: pattern of the patient's folder name).
        classes: labels that a folder may be named after; none: there are no labels without an index.
        wanted: whether a file in the folder is one; not asked about what an index lists.
        kind: what is looked for, for people: "image".

    Raises:
        DataError: 401 no such folder or no file in it, 402 an index without `file`, 403 a folder without
            a class or without a patient.
    """
    if not folder.is_dir():
        raise DataError(401, f"{folder} is no folder.", f"set data.path in site.toml to the folder of each {kind}.")
    if source.index is not None:
        index = folder / source.index
        columns, place = read_cells(index)
        if "file" not in columns:
            raise absent(index, "column", "file", columns)
        return Listing(index, index.parent, columns["file"], columns, source.patient, place)
    files = files_below(folder, wanted)
    if not files:
        raise DataError(401, f"{folder} holds no {kind}.", "check data.path in site.toml and data.source.")
    columns = {"file": files, "patient": [_patient(folder, file, source.patient) for file in files]}
    if classes:
        columns[source.label] = [_label(folder, file, classes) for file in files]
    return Listing(folder, folder, files, columns, "patient", lambda i: str(folder / files[i]))


def files_below(folder: Path, wanted: Callable[[Path], bool]) -> list[str]:
    """Files relative to the folder, in a fixed order; hidden ones (macOS "._x.png") are none."""
    relative = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    shown = [file for file in relative if not any(part.startswith(".") for part in Path(file).parts)]
    return [file for file in shown if wanted(folder / file)]


def unreadable(path: Path, what: str) -> DataError:
    """Error 406 for a file of which `what` tells what is wrong."""
    return DataError(406, f"{path} {what}.", "replace the file by an intact copy, or take it out of the data.")


@contextmanager
def reading(path: Path, listed: str = "", quotes: bool = True) -> Iterator[None]:
    """Tell what a decoder raises as error 406, in its words if it `quotes` them; `listed` tells where the file is."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise unreadable(path, f"is not there{listed}") from None
    except Exception as error:  # decoders raise whatever they like, SyntaxError included
        raise unreadable(path, f"cannot be read ({error if quotes else type(error).__name__}){listed}") from None


def _label(folder: Path, file: str, classes: Collection[str]) -> str:
    """The class that the folders above a file name."""
    above = Path(file).parts[:-1]
    named = {plain(part) for part in above} & set(classes)
    named = named or {label for label in classes for part in above if part.endswith(f"_{label}")}
    if len(named) == 1:
        return named.pop()
    what = f"is in folders of {', '.join(sorted(named))}" if named else "is in no folder of a class"
    remedy = "name a folder above it <class> or <anything>_<class>, or list the labels in an index (data.index)."
    raise DataError(403, f"{folder / file} {what}; data.classes names {', '.join(classes)}.", remedy)


def _patient(folder: Path, file: str, pattern: str | None) -> str:
    """The nearest folder above a file that looks like a patient; else, without a pattern, the file.

    The folder's name alone is the patient: MURA shows a patient's elbow and wrist in different branches.
    """
    for part in reversed(Path(file).parts[:-1]):
        if fnmatch(part.lower(), (pattern or "patient*").lower()):
            return part
    if pattern is None:
        return file
    what = f"{folder / file} is in no folder named {pattern!r}, which data.patient says is the patient."
    raise DataError(403, what, "correct data.patient in site.toml, or leave it out.")
