"""Tests in containers: with a Docker daemon and its compose, or not at all."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

import pytest

from tests.containers.daemon import chosen


@pytest.fixture(scope="session")
def images() -> Iterator[dict[str, str]]:
    """The images that compose takes, by the names of their variables; skips where no daemon answers."""
    if shutil.which("docker") is None:
        pytest.skip("docker is not installed")
    for command in (["docker", "info"], ["docker", "compose", "version"]):
        asked = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if asked.returncode != 0:
            pytest.skip(f"{' '.join(command)}: {asked.stderr.strip().splitlines()[-1]}")
    with pytest.MonkeyPatch.context() as environment:
        for name, image in chosen().items():
            environment.setenv(name, image)
        yield chosen()
