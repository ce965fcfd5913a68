"""The words of docstrings: plain English of the field, and no dialect of our own."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("broker", "shared", "site_worker", "server_worker", "simulation", "console", "benchmarks")
FIRST = re.compile(r"(What|Whether|Where|Of|Let|How|Who|Whose|See)\b")
ANYWHERE = re.compile(r"\b(what|whose|whom|whoever|nobody|everybody|anybody)\b", re.IGNORECASE)


def docstrings(package: str) -> Iterator[tuple[str, str]]:
    """Place and first line of every docstring, those of attributes included."""
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                yield f"{path.relative_to(ROOT)}, line {node.lineno}", node.value.value.splitlines()[0]


def in_dialect(line: str) -> bool:
    return bool(FIRST.match(line) or ANYWHERE.search(line))


def test_none_begins_with_a_relative_clause() -> None:
    lines = [(where, line) for package in PACKAGES for where, line in docstrings(package)]
    assert [f"{where}: {line}" for where, line in lines if FIRST.match(line)] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_few_docstrings_begin_in_dialect(package: str) -> None:
    lines = list(docstrings(package))
    found = [f"{where}: {line}" for where, line in lines if in_dialect(line)]
    assert len(lines) > 20
    assert len(found) < 0.02 * len(lines), "\n".join(found)


def test_the_words_are_seen() -> None:
    assert all(map(in_dialect, ("What a site sends.", "Of a frame.", "Return whoever comes first.", "See `Role`.")))
    assert not any(map(in_dialect, ("Return whether the run is over.", "Seconds since the last beat.")))
