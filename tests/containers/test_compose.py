"""`docker compose up` in a clone: the night as it is, and the night with everything restarted and a site cut off."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from testcontainers.compose import DockerCompose

from tests.containers.daemon import bridge_address, docker
from tests.harness.clone import clone
from tests.harness.services import wait_until

pytestmark = [pytest.mark.containers, pytest.mark.campaign, pytest.mark.timeout(1800)]

SERVER = "/example/compose/server.toml"
NIGHT_S = 600.0
NETWORK = "{{range $name, $_ := .NetworkSettings.Networks}}{{$name}}{{end}}"


class Project:
    """A clone whose compose.yaml is up.

    Args:
        folder: the clone; its name is the project's.
        listen: address of this machine at which broker and store listen.
    """

    def __init__(self, folder: Path, listen: str = "127.0.0.9") -> None:
        self.folder = folder
        # A machine that tests may have a Redis of its own at 127.0.0.1.
        self.environment = {**os.environ, "NIGHTSPLIT_LISTEN": listen}

    def compose(self, *arguments: str, check: bool = True) -> str:
        """What `docker compose` prints."""
        done = subprocess.run(
            ["docker", "compose", *arguments], cwd=self.folder, env=self.environment,
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0 or not check, f"{arguments}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
        return done.stdout

    def container(self, service: str) -> str:
        """Id of a service's container."""
        return self.compose("ps", "-q", service).strip()

    def logs(self, *services: str) -> str:
        """What services said."""
        return self.compose("logs", "--no-color", *services)

    def wait_for(self, service: str, words: str) -> None:
        """Until a service has said `words`."""
        wait_until(lambda: words in self.logs(service), NIGHT_S, f"{service}: {words}")

    def report(self) -> dict[str, object]:
        """The report, out of the server's volume."""
        printed = self.compose("run", "--rm", "--no-deps", "--entrypoint", "cat", "server", "/state/report/report.json")
        told: dict[str, object] = json.loads(printed)
        return told

    def remove(self) -> None:
        """Containers, volumes and network."""
        self.compose("down", "--volumes", "--timeout", "5", check=False)


@pytest.fixture(scope="module")
def undisturbed(images: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, object]]:
    """The report of a night that nobody disturbs: what a new user does, and nothing more."""
    project = Project(clone(tmp_path_factory.mktemp("calm") / "night"))
    stack = DockerCompose(str(project.folder), build=True, wait=False)
    os.environ["NIGHTSPLIT_LISTEN"] = project.environment["NIGHTSPLIT_LISTEN"]
    try:
        stack.start()
        project.wait_for("server", "server: finished")
        wait_until(lambda: "report in" in project.logs("server"), 30, "the report")
        yield project.report()
    finally:
        del os.environ["NIGHTSPLIT_LISTEN"]
        project.remove()


def test_a_new_user_gets_a_report(undisturbed: dict[str, object]) -> None:
    assert undisturbed["run"] == "cholesterol"
    assert undisturbed["steps"] == 1020


def test_the_image_is_small_and_its_user_is_nobody_special(
    images: dict[str, str], undisturbed: dict[str, object]
) -> None:
    layers = json.loads(docker("inspect", "nightsplit"))[0]
    assert layers["Config"]["User"] == "nightsplit"
    base = json.loads(docker("inspect", f"python:{images['NIGHTSPLIT_PYTHON']}-slim"))[0]["Size"]
    # What we add to python:3.13-slim, whose public image has 0.12 GB.
    assert layers["Size"] - base < 1.2e9 - 0.12e9


def test_restarts_of_everything_and_a_site_cut_off(undisturbed: dict[str, object], tmp_path: Path) -> None:
    """East is a hospital of its own, by examples/site; south loses its network; everything else is restarted."""
    bridge = bridge_address()
    centre = Project(clone(tmp_path / "centre"), bridge)
    hospital = Project(centre.folder / "examples/site")
    try:
        centre.compose("up", "-d", "rabbitmq", "redis")
        wait_until(lambda: "healthy" in centre.compose("ps", "rabbitmq"), 120, "RabbitMQ")
        centre.compose("run", "--rm", "server", "open", SERVER)
        move_east(centre, hospital, bridge)
        hospital.compose("run", "--rm", "site", "approve", "/config/site.toml", "--by", "tests", "--yes")
        hospital.compose("up", "-d")
        centre.compose("up", "-d", "north", "south")
        centre.wait_for("south", "answered 0")
        network = docker("inspect", centre.container("south"), "--format", NETWORK)
        docker("network", "disconnect", network, centre.container("south"))
        centre.compose("up", "-d", "server")
        # In strict order nobody gets far without south: what follows happens in the middle of the run.
        centre.wait_for("server", "server: working")
        for service in ("rabbitmq", "redis"):
            docker("restart", centre.container(service))
        for service in ("server", "north"):
            docker("kill", centre.container(service))
            docker("start", centre.container(service))
        docker("restart", hospital.container("site"))
        docker("network", "connect", "--alias", "south", network, centre.container("south"))
        centre.wait_for("server", "server: finished")
        # The weights differ, since every hospital's worker has made a secret of its own.
        assert centre.report()["steps"] == undisturbed["steps"]
        for project, site in ((centre, "north"), (centre, "south"), (hospital, "site")):
            project.wait_for(site, "the site's part of the model is in")
    finally:
        hospital.remove()
        centre.remove()


def move_east(centre: Project, hospital: Project, address: str) -> None:
    """Hand east's folder over, with the keys that are the hospital's own, and say there where its data is."""
    config, data = hospital.folder / "config", hospital.folder / "data"
    config.mkdir()
    data.mkdir()
    handing = "cp /keys/sites/east/* /config; cp /example/east.csv /data; chown -R 10001 /config"
    centre.compose(
        "run", "--rm", "-v", f"{config}:/config", "-v", f"{data}:/data", "--entrypoint", "sh", "keys", "-ec", handing
    )
    site, policy = config / "site.toml", config / "policy.toml"
    changes = {
        'state = "state"': 'state = "/state"', '"approved.toml"': '"/state/approved.toml"',
        "data.csv": "/data/east.csv", 'label = "label"': 'label = "ldl"',
    }  # fmt: skip
    text = site.read_text()
    for before, after in changes.items():
        assert before in text
        text = text.replace(before, after)
    site.write_text(text)
    policy.write_text(policy.read_text().replace('["activations"', '["labels", "activations"'))
    # The centre's names lead to this machine, as a hospital's DNS would say.
    hosts = f"services: {{site: {{extra_hosts: ['rabbitmq:{address}', 'redis:{address}']}}}}\n"
    (hospital.folder / "compose.override.yaml").write_text(hosts)
