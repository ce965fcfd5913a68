"""Pages point to what is there, and name what the source has."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = (
    "broker", "shared", "site_worker", "server_worker", "simulation", "console", "benchmarks", "tests", "examples",
    "docs",
)  # fmt: skip
TEXTS = {".md", ".py", ".toml", ".yml", ".yaml", ".json", ".lua"}
PACKAGES = FOLDERS[:6]


def texts() -> Iterator[tuple[Path, str]]:
    """Every text of the repository that may point to a page."""
    found = [path for path in ROOT.iterdir() if path.is_file() and (path.suffix in TEXTS or path.name == "Dockerfile")]
    found += [path for name in FOLDERS for path in (ROOT / name).rglob("*") if path.suffix in TEXTS]
    for path in sorted(found):
        yield path, path.read_text(encoding="utf-8")


def headings(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them; of equal ones the later have a number."""
    anchors: set[str] = set()
    for title in re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        anchor = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        anchors.add(next(name for name in (anchor, *(f"{anchor}-{n}" for n in range(1, 99))) if name not in anchors))
    return anchors


def broken_links(path: Path, text: str) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        page = (path.parent / name) if name else path
        if "://" in target:
            continue
        if not page.exists():
            yield target
        elif anchor and anchor not in headings(page):
            yield f"{target} (no such heading)"


def missing_paths(text: str) -> Iterator[str]:
    for name in re.findall(r"(?<![\w./-])docs/[\w./-]*", text):
        if not (ROOT / name.rstrip(".")).exists():
            yield name


def test_every_link_and_every_path_of_a_page_leads_somewhere() -> None:
    broken = [
        f"{path.relative_to(ROOT)}: {target}"
        for path, text in texts()
        for target in [*(broken_links(path, text) if path.suffix == ".md" else ()), *missing_paths(text)]
    ]
    assert not broken, "\n".join(broken)


def test_the_check_finds_what_is_broken(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One thing\n\n[a](#one-thing) [b](#another) [c](none.md) [d](page.md#one-thing)\n")
    assert list(broken_links(page, page.read_text())) == ["#another (no such heading)", "none.md"]
    beside = "docs/" + "errors"  # in two parts, since this file is read as well
    assert list(missing_paths(f"see {beside}/104.md, {beside}/999.md.")) == [f"{beside}/999.md."]


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").glob("*/*.md")}
    listed = set(re.findall(r"\]\(([^)]+\.md)\)", index))
    assert listed == {page for page in pages if not re.fullmatch(r"errors/\d+\.md", page)}


@pytest.mark.parametrize("name", ["delivery.md", "decisions.md", "concepts.md"])
def test_names_in_the_documents_exist(name: str) -> None:
    """`Class.method`, `a/file.py` and (a/file.py) in a text must be there in the source."""
    text = (ROOT / "docs" / "explanation" / name).read_text(encoding="utf-8")
    source = {path: path.read_text(encoding="utf-8") for folder in PACKAGES for path in (ROOT / folder).rglob("*.py")}
    for kind, member in re.findall(r"`([A-Z][A-Za-z]+)\.([a-z_]+)`", text):
        homes = [code for code in source.values() if re.search(rf"^class {kind}\b", code, re.MULTILINE)]
        assert homes, f"{name}: no class {kind}"
        assert any(re.search(rf"\b{member}\b", code) for code in homes), f"{name}: no {kind}.{member}"
    for file in re.findall(rf"(?<![\w/])((?:{'|'.join(PACKAGES)})/[a-z_/]+\.py)", text):
        assert ROOT / file in source, f"{name}: no {file}"
