"""Tests in containers: with a Docker daemon and its compose, or not at all."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session", autouse=True)
def docker() -> None:
    """Skips where no daemon answers."""
    if shutil.which("docker") is None:
        pytest.skip("docker is not installed")
    for command in (["docker", "info"], ["docker", "compose", "version"]):
        asked = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if asked.returncode != 0:
            pytest.skip(f"{' '.join(command)}: {asked.stderr.strip().splitlines()[-1]}")


def clone(folder: Path) -> Path:
    """The files of this checkout, as a user who clones it has them."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True
    ).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder
