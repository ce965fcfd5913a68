"""Other versions of RabbitMQ, Redis and Valkey than the installed ones, to run tests against.

Each subfolder of the folder that NIGHTSPLIT_SERVERS names has the programs of one distribution in `bin`:
rabbitmq-server and rabbitmqctl, redis-server, valkey-server. `.ci/servers` makes such folders.
"""

from __future__ import annotations

import os
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

SERVERS = "NIGHTSPLIT_SERVERS"
PROGRAMS = {"RabbitMQ": "rabbitmqctl", "Redis": "redis-server", "Valkey": "valkey-server"}


@cache
def servers() -> dict[str, Path]:
    """The folder of the programs, by product and version: "RabbitMQ 4.0", "Valkey 8"."""
    found = {}
    if root := os.environ.get(SERVERS):
        for folder in sorted(Path(root).glob("*/bin")):
            for product, program in PROGRAMS.items():
                if (folder / program).exists():
                    found[f"{product} {_version(product, folder / program)}"] = folder
    return found


def folder_of(server: str) -> Path:
    """The folder of a server's programs; skips the test where there is none."""
    if server not in servers():
        pytest.skip(f"no {server} in a folder of {SERVERS}={os.environ.get(SERVERS, '')}")
    return servers()[server]


def _version(product: str, program: Path) -> str:
    """Major and minor of RabbitMQ, whose minor versions differ; else the major one."""
    question = "version" if product == "RabbitMQ" else "--version"
    told = subprocess.run([program, question], capture_output=True, text=True, timeout=60, check=True).stdout
    version = re.search(r"(\d+)\.(\d+)\.\d+", told)
    assert version, told
    return f"{version[1]}.{version[2]}" if product == "RabbitMQ" else version[1]


def environment(product: str, folder: Path) -> dict[str, str]:
    """The variables by which `tests.harness.services` takes a server from a folder."""
    if product == "RabbitMQ":
        return {"NIGHTSPLIT_RABBITMQ": str(folder)}
    return {"NIGHTSPLIT_REDIS": str(folder / PROGRAMS[product])}
