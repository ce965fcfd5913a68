"""Every number has a title, a page and a use; every class of error keeps to its own hundred."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from nightsplit.shared import errors
from nightsplit.shared.errors import TITLES, NightsplitError

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "errors"
BANDS = {
    "ConfigError": 1,
    "BrokerError": 2,
    "MissingRightError": 2,
    "Refused": 3,
    "DataError": 4,
    "StateError": 5,
    "RunError": 6,
    # functions that raise or return an error of the number they are given
    "broker_errors": 2,
    "refusal": 3,
}
REJECTIONS = {405, 409, 504, 601, 608, 617}
"""Sent as plain numbers in the server's rejection of a hello, and raised at the site as RunError."""


@dataclass(frozen=True)
class Use:
    number: int
    by: str
    where: str


def uses() -> Iterator[Use]:
    """Every literal number that an error is made with."""
    for package in ("broker", "shared", "site_worker", "server_worker", "simulation", "console"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                where = f"{path.relative_to(ROOT)}, line {getattr(node, 'lineno', 0)}"
                if isinstance(node, ast.Call):
                    by = ast.unparse(node.func).rpartition(".")[2]
                    if by in BANDS and node.args and isinstance(node.args[0], ast.Constant):
                        yield Use(node.args[0].value, by, where)
                elif isinstance(node, ast.Tuple) and [type(x) for x in node.elts[:1]] == [ast.Constant]:
                    first = node.elts[0]
                    assert isinstance(first, ast.Constant)
                    if (
                        {"role.py", "protocols"} & set(path.parts)
                        and type(first.value) is int
                        and first.value in TITLES
                    ):
                        yield Use(first.value, "rejection", where)


USES = list(uses())


def page(number: int) -> str:
    return (PAGES / f"{number}.md").read_text(encoding="utf-8")


def test_the_scan_finds_uses() -> None:
    assert len(USES) > 100
    assert {use.by for use in USES} == {*BANDS, "rejection"}


def test_every_use_has_a_title_in_its_band() -> None:
    assert [use for use in USES if use.number not in TITLES] == []
    assert [use for use in USES if use.by != "rejection" and use.number // 100 != BANDS[use.by]] == []


def test_rejections_are_the_ones_that_the_index_names() -> None:
    assert {use.number for use in USES if use.by == "rejection"} == REJECTIONS
    index = page_text("README.md")
    assert all(str(number) in index.rpartition("rejects a site")[2] for number in REJECTIONS)


def page_text(name: str) -> str:
    return (PAGES / name).read_text(encoding="utf-8")


def test_every_number_is_used() -> None:
    assert TITLES.keys() - {use.number for use in USES} == set(), "remove them, or use them"


def faults_of_the_page(number: int) -> Iterator[str]:
    lines = page(number).splitlines()
    if lines[0] != f"# E{number} {TITLES[number]}":
        yield f"{number}: the heading is not the title"
    example = lines[lines.index("```") + 1]
    if not example.startswith(f"E{number} {TITLES[number]}: "):
        yield f"{number}: the example has another title"
    if " Fix: " not in example or not example.endswith(f"(nightsplit explain {number})"):
        yield f"{number}: the example is no error line"
    for heading in ("## What happened", "## How to resolve", "## Is anything lost?"):
        if heading not in lines:
            yield f"{number}: no {heading}"


def test_every_number_has_its_page() -> None:
    assert [fault for number in TITLES for fault in faults_of_the_page(number)] == []


def test_no_page_and_no_line_of_the_index_without_a_number() -> None:
    assert {int(path.stem) for path in PAGES.glob("[0-9]*.md")} == set(TITLES)
    rows = [line for line in page_text("README.md").splitlines() if line.startswith("| [")]
    assert rows == [f"| [{number}]({number}.md) | {title} |" for number, title in sorted(TITLES.items())]


def test_what_a_user_reads() -> None:
    error = errors.BrokerError(201, "localhost:5672: connection refused.", "start the broker.")
    assert isinstance(error, NightsplitError)
    assert str(error) == (
        "E201 Broker cannot be reached: localhost:5672: connection refused. Fix: start the broker. "
        "(nightsplit explain 201)"
    )


def test_a_number_without_a_title_is_a_fault() -> None:
    with pytest.raises(AssertionError, match="999"):
        errors.ConfigError(999, "no.", "no.")


def test_the_drawing_shows_every_class() -> None:
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, NightsplitError)]
    assert errors.__doc__ is not None
    for kind in classes:
        assert kind.__name__ in errors.__doc__
