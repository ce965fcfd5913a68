"""Tests in containers: with a Docker daemon and its compose, or not at all."""

from __future__ import annotations

import shutil
import subprocess

import pytest


@pytest.fixture(scope="session", autouse=True)
def docker() -> None:
    """Skips where no daemon answers."""
    if shutil.which("docker") is None:
        pytest.skip("docker is not installed")
    for command in (["docker", "info"], ["docker", "compose", "version"]):
        asked = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if asked.returncode != 0:
            pytest.skip(f"{' '.join(command)}: {asked.stderr.strip().splitlines()[-1]}")
