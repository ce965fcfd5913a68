"""A commented option of an example, `# key = value`, works when the comment sign is taken away."""

import re
from pathlib import Path

from nightsplit.server_worker.config import ServerConfig
from nightsplit.shared.config.load import load
from nightsplit.shared.errors import ConfigError
from nightsplit.shared.runtime.shift import Shift
from nightsplit.site_worker.config import SiteConfig

EXAMPLES = Path(__file__).parents[2] / "examples"
OPTION = re.compile(r"^# (?=\w+ = )", re.MULTILINE)


def fault_in(path: Path) -> str | None:
    """What is wrong with a worker's file, its hours of work included."""
    kind: type[SiteConfig] | type[ServerConfig] = ServerConfig if "[server]" in path.read_text() else SiteConfig
    try:
        config = load(path, kind)
        Shift((config.server if isinstance(config, ServerConfig) else config.site).shift)
    except ConfigError as error:
        return str(error)
    return None


def test_every_commented_option_is_accepted(tmp_path: Path) -> None:
    tried, faults = set(), []
    for path in sorted(EXAMPLES.glob("**/*.toml")):
        text, count = OPTION.subn("", path.read_text())
        if count:
            tried.add(path.name)
            (tmp_path / path.name).write_text(text)
            if fault := fault_in(tmp_path / path.name):
                faults.append(f"{path.relative_to(EXAMPLES)}: {fault}")
    assert {"server.toml", "north.toml"} <= tried
    assert not faults, "\n".join(faults)


def test_a_shift_without_a_zone_is_a_fault(tmp_path: Path) -> None:
    text = (EXAMPLES / "cholesterol" / "north.toml").read_text()
    (tmp_path / "north.toml").write_text(OPTION.sub("", text).replace(" Europe/Berlin", ""))
    assert "E106" in str(fault_in(tmp_path / "north.toml"))
