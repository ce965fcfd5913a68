"""Questions of the tests to a Docker daemon: images, an address, versions."""

from __future__ import annotations

import json
import os
import re
import subprocess
from functools import cache
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DEFAULT_BRIDGE = "172.17.0.0/16"


def docker(*arguments: str) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{arguments}: {done.stderr}"
    return done.stdout.strip()


def defaults() -> dict[str, str]:
    """The settings in .env."""
    lines = (ROOT / ".env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


@cache
def chosen() -> dict[str, str]:
    """Images of broker and store and the Python of the workers, by the names of their variables.

    Those of the environment or of .env. A daemon that neither has such an image nor can pull it takes the newest
    of the same name that it has.
    """
    wanted = {**defaults(), **os.environ}
    python = available(f"python:{wanted['NIGHTSPLIT_PYTHON']}-slim")
    services = {name: available(wanted[name]) for name in ("NIGHTSPLIT_RABBITMQ_IMAGE", "NIGHTSPLIT_REDIS_IMAGE")}
    return {**services, "NIGHTSPLIT_PYTHON": version_of(python)}


def available(image: str) -> str:
    """`image` if the daemon has it or can pull it, else the newest of its repository and kind that it has."""
    for attempt in (["image", "inspect"], ["pull", "-q"]):
        if subprocess.run(["docker", *attempt, image], capture_output=True, timeout=600).returncode == 0:
            return image
    repository, _, tag = image.partition(":")
    kind = tag.removeprefix(version_of(image))
    tags = docker("images", repository, "--format", "{{.Tag}}").split()
    fitting = [tag for tag in tags if re.fullmatch(rf"\d+(\.\d+)*{re.escape(kind)}", tag)]
    assert fitting, f"no image of {repository} here, and none can be pulled"
    return f"{repository}:{max(fitting, key=lambda tag: [int(n) for n in version_of(tag).split('.')])}"


def version_of(image: str) -> str:
    """The version in an image's tag: 4.3 of rabbitmq:4.3-management."""
    found = re.match(r"[\d.]+", image.rpartition(":")[2])
    assert found, f"{image} names no version"
    return found.group()


def bridge_address() -> str:
    """This machine's address in the daemon's default network, by which containers reach it."""
    (network,) = json.loads(docker("network", "inspect", "bridge"))
    return gateway(network)


def gateway(network: dict[str, Any]) -> str:
    """The address of the host in a network that a daemon describes; its first one where the daemon leaves it unsaid."""
    parts = [part for part in network["IPAM"].get("Config") or [{}] if ":" not in part.get("Subnet", "")]
    return parts[0].get("Gateway") or str(next(IPv4Network(parts[0].get("Subnet", DEFAULT_BRIDGE)).hosts()))
