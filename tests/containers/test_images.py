"""The images that compose.yaml and the examples name, and what is in them."""

from __future__ import annotations

import re

import pytest

from tests.containers.daemon import ROOT, bridge_address, defaults, docker, gateway, version_of

COMPOSE = [ROOT / "compose.yaml", *sorted(ROOT.glob("examples/*/compose.yaml"))]
SUBNET = {"Subnet": "172.30.0.0/24"}


def run(image: str, program: str, *arguments: str) -> str:
    return docker("run", "--rm", "--entrypoint", program, image, *arguments)


def test_every_file_has_the_defaults_of_the_settings() -> None:
    named = {
        (name, default)
        for path in COMPOSE
        for name, default in re.findall(r"\$\{(NIGHTSPLIT_\w+):-([^}]*)\}", path.read_text())
        if name in ("NIGHTSPLIT_RABBITMQ_IMAGE", "NIGHTSPLIT_REDIS_IMAGE", "NIGHTSPLIT_PYTHON")
    }
    assert len(named) == 3
    assert named <= set(defaults().items())
    assert f"ARG PYTHON={defaults()['NIGHTSPLIT_PYTHON']}\n" in (ROOT / "Dockerfile").read_text()


@pytest.mark.parametrize(
    ("config", "address"),
    [
        ([{**SUBNET, "Gateway": "172.30.0.254"}], "172.30.0.254"),
        ([SUBNET], "172.30.0.1"),
        ([{"Subnet": "fd00::/64", "Gateway": "fd00::1"}, SUBNET], "172.30.0.1"),
        ([], "172.17.0.1"),
        (None, "172.17.0.1"),
    ],
)
def test_a_daemon_may_leave_the_address_of_its_bridge_unsaid(config: list[dict[str, str]], address: str) -> None:
    assert gateway({"IPAM": {"Driver": "default", "Config": config}}) == address


@pytest.mark.containers
@pytest.mark.campaign
def test_an_image_holds_the_version_that_its_name_says(images: dict[str, str]) -> None:
    """Also one that was made on this machine, under a public name."""
    broker, store, python = images.values()
    assert run(broker, "rabbitmqctl", "version").startswith(version_of(broker))
    program = "valkey-server" if "valkey" in store else "redis-server"
    assert f"v={version_of(store)}" in run(store, program, "--version")
    assert f"Python {python}." in run(f"python:{python}-slim", "python", "--version")


@pytest.mark.containers
@pytest.mark.campaign
def test_a_container_reaches_this_machine_at_the_bridge(images: dict[str, str]) -> None:
    """By the container's own default route, whose third column is the gateway, little-endian hexadecimal."""
    python = f"python:{images['NIGHTSPLIT_PYTHON']}-slim"
    routes = run(python, "cat", "/proc/net/route")
    default = next(row for row in map(str.split, routes.splitlines()[1:]) if row[1] == "00000000")
    assert ".".join(map(str, reversed(bytes.fromhex(default[2])))) == bridge_address()
