"""docs/reference/configuration.md names every key with its default."""

import json
import re
from pathlib import Path

import msgspec
import pytest

from nightsplit.console.pretrain import PretrainSection, PublicSource
from nightsplit.server_worker.config import ServerSection
from nightsplit.shared.config.optimizer import OptimizerSection
from nightsplit.shared.config.run import (
    DataSection,
    ModelSection,
    PrivacySection,
    RoundSection,
    RunSection,
    TaskSection,
    WireSection,
)
from nightsplit.site_worker.config import PolicyConfig, SiteSection, SourceSection

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "configuration.md").read_text(encoding="utf-8")
SECTIONS = {
    ("run.toml", "[run]"): RunSection,
    ("run.toml", "[model]"): ModelSection,
    ("run.toml", "[task]"): TaskSection,
    ("run.toml", "[optimizer]"): OptimizerSection,
    ("run.toml", "[round]"): RoundSection,
    ("run.toml", "[privacy]"): PrivacySection,
    ("run.toml", "[wire]"): WireSection,
    ("run.toml", "[data]"): DataSection,
    ("site.toml", "[site]"): SiteSection,
    ("site.toml", "[data]"): SourceSection,
    ("policy.toml", None): PolicyConfig,
    ("pretrain.toml", "[pretrain]"): PretrainSection,
}


def told(file: str, table: str | None) -> dict[str, str]:
    """Keys of a section of the page, and their defaults as written."""
    text = PAGE.split(f"\n## {file}\n")[1].split("\n## ")[0]
    if table is not None:
        text = text.split(f"\n### `{table}`\n")[1].split("\n### ")[0]
    return {match[1]: match[2] for match in re.finditer(r"^\| `(\w+)` \| (.+?) \| .+ \| `.+` \|$", text, re.MULTILINE)}


def default(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "**required**"
    value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    return "none" if value is None else f"`{json.dumps(value)}`"


@pytest.mark.parametrize(("file", "table"), SECTIONS, ids=str)
def test_every_key_with_its_default(file: str, table: str | None) -> None:
    fields = msgspec.structs.fields(SECTIONS[file, table])
    assert told(file, table) == {field.name: default(field) for field in fields}


def test_server() -> None:
    extra = {f.name for f in msgspec.structs.fields(ServerSection)} - {
        f.name for f in msgspec.structs.fields(SiteSection)
    }
    assert extra == {"report"}
    assert told("server.toml", "[server]") == {"report": '`"report"`'}


def test_sources_of_a_pretraining() -> None:
    extra = {f.name: default(f) for f in msgspec.structs.fields(PublicSource)}
    for field in msgspec.structs.fields(SourceSection):
        del extra[field.name]
    assert told("pretrain.toml", "[[source]]") == extra
