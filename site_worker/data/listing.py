"""The files of a folder, with label and patient from an index or from the folders' names.

With an index (a CSV with a `file` column) label and patient are columns of it. Without one:

    covid/scan7.png                                   label: a folder named after a class
    patient00005/study1_positive/image1.png           label: a folder that ends in _<class> (MURA)

and the patient is the nearest folder named patient*, else every file is a patient.

A folder with the exact name of a class has priority over a folder that ends in one.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from nightsplit.shared.errors import DataError
from nightsplit.site_worker.config import SourceSection
from nightsplit.site_worker.data.cells import read_cells
from nightsplit.site_worker.data.rows import missing_name_error, normalize


@dataclass(frozen=True)
class Listing:
    """Files with their labels and patients.

    Attributes:
        source: the index, or the folder without one.
        base: folder of the relative paths in `files`.
        files: relative paths, in the order of the index, or sorted.
        columns: cells as text, one per file.
        patient: column of the patient; None: unknown.
        location: location of an entry in the index, for error texts.
    """

    source: Path
    base: Path
    files: list[str]
    columns: dict[str, list[str]]
    patient: str | None
    location: Callable[[int], str]

    def reference(self, i: int) -> str:
        """Return ", listed in index.csv, line 7" for the end of an error text; empty without an index."""
        return "" if self.source == self.base else f", listed in {self.location(i)}"


def list_files(
    folder: Path, source: SourceSection, classes: Collection[str], is_wanted: Callable[[Path], bool], kind: str
) -> Listing:
    """List the files of the index, or of the folder if there is no index.

    Args:
        folder: the folder.
        source: `index`, `label` and `patient` (without an index: pattern of the patient's folder name).
        classes: labels that may be names of folders; empty: no labels without an index.
        is_wanted: selects files in the folder; not used with an index.
        kind: kind of file for error texts: "image".

    Raises:
        DataError: 401 no such folder or no file in it, 402 an index without `file`, 403 a folder without
            a class or without a patient.
    """
    if not folder.is_dir():
        raise DataError(401, f"{folder} is not a folder.", f"set data.path in site.toml to the folder of each {kind}.")
    if source.index is not None:
        index = folder / source.index
        columns, location = read_cells(index)
        if "file" not in columns:
            raise missing_name_error(index, "column", "file", columns)
        return Listing(index, index.parent, columns["file"], columns, source.patient, location)
    files = files_below(folder, is_wanted)
    if not files:
        raise DataError(401, f"{folder} contains no {kind}.", "check data.path in site.toml and data.source.")
    columns = {"file": files, "patient": [_find_patient(folder, file, source.patient) for file in files]}
    if classes:
        columns[source.label] = [_find_label(folder, file, classes) for file in files]
    return Listing(folder, folder, files, columns, "patient", lambda i: str(folder / files[i]))


def files_below(folder: Path, is_wanted: Callable[[Path], bool]) -> list[str]:
    """List the files relative to the folder, sorted and without hidden files (macOS "._x.png")."""
    relative = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    visible = [file for file in relative if not any(part.startswith(".") for part in Path(file).parts)]
    return [file for file in visible if is_wanted(folder / file)]


def unreadable_error(path: Path, reason: str) -> DataError:
    """Return error 406 for a file."""
    return DataError(406, f"{path} {reason}.", "replace the file by an intact copy, or remove it from the data.")


@contextmanager
def reading(path: Path, reference: str = "", quotes: bool = True) -> Iterator[None]:
    """Raise error 406 for any exception of a decoder, with its text if `quotes`, and `reference` at the end."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise unreadable_error(path, f"does not exist{reference}") from None
    except Exception as error:  # decoders raise anything, even SyntaxError
        reason = error if quotes else type(error).__name__
        raise unreadable_error(path, f"cannot be read ({reason}){reference}") from None


def _find_label(folder: Path, file: str, classes: Collection[str]) -> str:
    """Return the class in the names of the folders above a file."""
    above = Path(file).parts[:-1]
    labels = {normalize(part) for part in above} & set(classes)
    labels = labels or {label for label in classes for part in above if part.endswith(f"_{label}")}
    if len(labels) == 1:
        return labels.pop()
    reason = f"is in folders of {', '.join(sorted(labels))}" if labels else "is in no folder of a class"
    remedy = "name a folder above it <class> or <anything>_<class>, or list the labels in an index (data.index)."
    raise DataError(403, f"{folder / file} {reason}; data.classes names {', '.join(classes)}.", remedy)


def _find_patient(folder: Path, file: str, pattern: str | None) -> str:
    """Return the nearest folder above a file that matches the patient's pattern; without a pattern, the file.

    The patient is the folder's name without its path: in MURA a patient's elbow and wrist are in different branches.
    """
    for part in reversed(Path(file).parts[:-1]):
        if fnmatch(part.lower(), (pattern or "patient*").lower()):
            return part
    if pattern is None:
        return file
    sentence = f"{folder / file} is in no folder named {pattern!r}, the pattern of data.patient."
    raise DataError(403, sentence, "correct or remove data.patient in site.toml.")
