"""A system more is three files, and no line elsewhere: it trains, and the policy knows what it sends."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PRODUCT = ("broker", "shared", "site_worker", "server_worker", "simulation", "console", "nightsplit")

SPEC = """
from dataclasses import replace

from nightsplit.shared.protocols import split_labels, stream
from nightsplit.shared.protocols.handshake import HANDSHAKE
from nightsplit.shared.wire.message import Kind
from nightsplit.shared.wire.schema import Payload, contract


def payloads(config, shapes):
    hidden = {"smashed": stream.activations(config, shapes), "notes": stream.targets(config)}
    smashed = Payload(Kind.SMASHED, hidden)
    return contract(*HANDSHAKE, smashed, *stream.answers(config, shapes), stream.finish(config, shapes))


SPEC = replace(split_labels.SPEC, name="split_signs", payloads=payloads, learns_by_targets=False)
"""

SITE = """
from nightsplit.shared.wire.message import Kind
from nightsplit.site_worker.protocols.split_labels import SplitLabelsSite


class SplitSignsSite(SplitLabelsSite):
    def message_at(self, slot, kind, tensors, **scalars):
        if kind is Kind.SMASHED:
            tensors = {"smashed": tensors["smashed"], "notes": tensors["targets"]}
        return super().message_at(slot, kind, tensors, **scalars)


ROLE = SplitSignsSite
"""

SERVER = """
from dataclasses import replace

from nightsplit.server_worker.protocols.split_labels import SplitLabelsServer
from nightsplit.shared.wire.message import Kind


class SplitSignsServer(SplitLabelsServer):
    def apply_item(self, site, slot, message):
        known = {"smashed": message.tensors["smashed"], "targets": message.tensors["notes"]}
        return super().apply_item(site, slot, replace(message, tensors=known))

    def answer(self, site, seq, kind, tensors={}, scalars={}):
        if kind is Kind.CUT_GRADIENT:
            tensors = {"gradient": tensors["gradient"].sign() * 0.01}
        return super().answer(site, seq, kind, tensors, scalars)


ROLE = SplitSignsServer
"""

PLAY = """
import sys
from pathlib import Path

import nightsplit
from nightsplit.shared.errors import ConfigError
from nightsplit.shared.protocols.spec import sketch
from nightsplit.shared.wire.schema import Reveals
from nightsplit.site_worker.config import PolicyConfig
from nightsplit.site_worker.policy import check_policy
from tests.harness.night import Night, tiny_config

house = Path(sys.argv[1])
assert Path(nightsplit.__file__).is_relative_to(house)
config = tiny_config(protocol="split_signs")
night = Night(config, house / "run").run()
server, north = night.server, night.roles["north"]
assert (type(server).__name__, type(north).__name__) == ("SplitSignsServer", "SplitSignsSite")
assert north.finished and server.done and server.evaluation.best and server.steps == 27
assert not server.refusals and all(night.broker.depth(queues.dead) == 0 for queues in night.queues.values())
packages = ["tests.harness.night"]
open_policy = PolicyConfig(allowed=[*PolicyConfig().allowed, Reveals.LABELS], packages=packages)
check_policy(open_policy, config, sketch(config), Path("policy.toml"))
try:
    check_policy(PolicyConfig(packages=packages), config, sketch(config), Path("policy.toml"))
except ConfigError as error:
    print(error.number, error.sentence)
"""


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy of the product, with three files more."""
    for folder in PRODUCT:
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for folder, code in (("shared", SPEC), ("site_worker", SITE), ("server_worker", SERVER)):
        (tmp_path / folder / "protocols" / "split_signs.py").write_text(code)
    return tmp_path


def python(house: Path, code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{house}:{ROOT}"}
    command = [sys.executable, "-c", code, str(house)]
    return subprocess.run(command, cwd=house, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.timeout(200)
def test_three_files_are_a_system_and_hidden_labels_do_not_pass(house: Path) -> None:
    played = python(house, PLAY)
    assert played.returncode == 0, played.stderr
    assert played.stdout.startswith("108 policy.toml: run 'night' (split_signs) needs \"labels\" in allowed (")


@pytest.mark.timeout(200)
def test_a_system_that_lacks_a_side_is_named_at_once(house: Path) -> None:
    path = house / "server_worker" / "protocols" / "split_signs.py"
    path.write_text(SERVER.replace("ROLE =", "HALF ="))
    told = python(house, "import nightsplit.server_worker.protocols").stderr.splitlines()[-1]
    assert told.startswith("ImportError: nightsplit.server_worker.protocols.split_signs has no ROLE")
    path.unlink()
    told = python(house, "import nightsplit.server_worker.protocols").stderr.splitlines()[-1]
    assert told.startswith("ImportError: split_signs has no role in nightsplit.server_worker.protocols: write ")


@pytest.mark.timeout(200)
def test_a_part_that_does_not_say_what_it_tells_cannot_be_sent(house: Path) -> None:
    path = house / "shared" / "protocols" / "split_signs.py"
    path.write_text(SPEC.replace("stream.targets(config)", "replace(stream.targets(config), reveals=None)"))
    told = python(house, PLAY).stderr.splitlines()[-1]
    assert told.startswith(
        "ValueError: smashed leaves a site: declare what it reveals about patients (reveals=): notes"
    )
