"""No command connects to an address that could be read over the network, or that parsers read differently (C4)."""

from __future__ import annotations

import json
import select
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from nightsplit.console.cli import run
from tests.harness.study import change, write_study

COMMANDS = [
    "doctor north.toml", "doctor server.toml", "open server.toml", "status server.toml", "status north.toml",
    "site north.toml", "server server.toml", "dlq list north.toml", "dlq list server.toml",
    "dlq replay server.toml --all", "dlq discard server.toml --all", "move server.toml --to other.toml",
    "move other.toml --to server.toml",
]  # fmt: skip
"""Commands that connect; other.toml is a usable copy of server.toml."""


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def connections(listener: socket.socket) -> int:
    """Connections that were opened, accepted or not."""
    count = 0
    while select.select([listener], [], [], 0)[0]:
        listener.accept()[0].close()
        count += 1
    return count


@pytest.mark.parametrize("service", ["broker", "store"])
@pytest.mark.parametrize(
    ("address", "number"), [("{scheme}://127.1:{port}/", 111), ("{scheme}://localhost:{port}#/", 107)]
)
def test_no_command_connects(address, number, service, listener, tmp_path: Path, monkeypatch, capsys) -> None:
    # To the system, 127.1 is this machine; to nightsplit it is a name like any other.
    port = listener.getsockname()[1]
    with socket.create_connection(("127.1", port)):
        assert connections(listener) == 1, "the listener counts"
    monkeypatch.chdir(tmp_path)
    scheme, own = {"broker": ("amqp", "embedded:broker"), "store": ("redis", "sqlite:run.db")}[service]
    write_study(tmp_path)
    shutil.copy(tmp_path / "server.toml", tmp_path / "other.toml")
    for name in ("north", "server"):
        change(tmp_path / f"{name}.toml", own, address.format(scheme=scheme, port=port))
    for command in COMMANDS:
        assert run([*command.split(), *(["--json"] if command.startswith("doctor") else [])]) == 1, command
        out, err = capsys.readouterr()
        if command.startswith("doctor"):
            assert [finding["found"][:5] for finding in json.loads(out)["checks"]] == [f"E{number} "]
        else:
            assert err.startswith(f"E{number} "), (command, out, err)
        assert connections(listener) == 0, command
