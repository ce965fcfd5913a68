"""The words of docstrings: plain English of the field, and no dialect of our own."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("broker", "shared", "site_worker", "server_worker", "simulation", "console")
FIRST = re.compile(r"(What|Whether|Where|Of|Let|How|Who|Whose|See)\b")
ANYWHERE = re.compile(r"\b(what|whose|whom|whoever|nobody|everybody|anybody)\b", re.IGNORECASE)


def first_lines(package: str) -> Iterator[tuple[str, str]]:
    """Where a docstring stands, and its first line."""
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                yield f"{path.relative_to(ROOT)}, line {getattr(node, 'lineno', 1)}", text.splitlines()[0]


def in_dialect(line: str) -> bool:
    return bool(FIRST.match(line) or ANYWHERE.search(line))


@pytest.mark.parametrize("package", PACKAGES)
def test_few_docstrings_begin_in_dialect(package: str) -> None:
    lines = list(first_lines(package))
    found = [f"{where}: {line}" for where, line in lines if in_dialect(line)]
    assert len(lines) > 20
    assert len(found) < 0.02 * len(lines), "\n".join(found)


def test_the_words_are_seen() -> None:
    assert all(map(in_dialect, ("What a site sends.", "Of a frame.", "Return whoever comes first.", "See `Role`.")))
    assert not any(map(in_dialect, ("Return whether the run is over.", "Seconds since the last beat.")))
