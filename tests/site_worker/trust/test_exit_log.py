"""The exit log: its lines, its chain, and everything that somebody could do to it."""

from __future__ import annotations

import hashlib
import json
import secrets
from contextlib import closing

import pytest
import torch

from nightsplit.shared.errors import StateError
from nightsplit.shared.trust.identity import Identity
from nightsplit.shared.trust.witness import cosign
from nightsplit.shared.wire.message import SERVER, Header, Kind
from nightsplit.shared.wire.schema import BATCH, Payload, Reveals, TensorSpec
from nightsplit.site_worker.trust.exit_log import ExitLog, read_log, verify

DIGEST = "ab" * 32
SMASHED = Payload(Kind.SMASHED, {"smashed": TensorSpec(torch.float32, (BATCH, 4), "fp16", reveals=Reveals.ACTIVATIONS)})
SERVER_KEY = Identity(secrets.token_bytes(32))


def log_in(folder) -> ExitLog:
    return ExitLog(folder / "exit_log.jsonl", DIGEST, folder / "policy.toml", "approval")


def send(log: ExitLog, seq: int) -> None:
    log.write(Header("run", "north", SERVER, Kind.SMASHED, seq), SMASHED, 16, [b"head", b"body %d" % seq])


def signed(log: ExitLog, key: Identity = SERVER_KEY, site: str = "north") -> dict[str, int | str]:
    lines, head = log.synced_head()
    return {"lines": lines, "head_signed": head, "signature": cosign(key, DIGEST, site, lines, head)}


def filled(folder, count: int, every: int = 64):
    with closing(log_in(folder)) as log:
        for seq in range(1, count + 1):
            send(log, seq)
            if seq % every == 0:
                log.witness(signed(log))
    return folder / "exit_log.jsonl"


def check(path):
    return verify(path, DIGEST, "north", SERVER_KEY.public)


def test_a_line_says_what_left(tmp_path):
    (tmp_path / "policy.toml").write_text("min_batch = 8\n")
    path = filled(tmp_path, 1)
    [line] = read_log(path)
    assert {name: line[name] for name in ("line", "kind", "seq", "rows", "bytes", "reveals", "approval")} == {
        "line": 1, "kind": "smashed", "seq": 1, "rows": 16, "bytes": 10, "reveals": ["activations"],
        "approval": "approval",
    }  # fmt: skip
    assert line["sha256"] == hashlib.sha256(b"headbody 1").hexdigest()
    assert line["policy"] == hashlib.sha256(b"min_batch = 8\n").hexdigest()
    assert path.stat().st_mode & 0o077 == 0


def test_a_log_goes_on_in_the_next_process(tmp_path):
    path = filled(tmp_path, 5)
    with closing(log_in(tmp_path)) as log:
        send(log, 6)
        assert (log.lines, log.head) == (6, list(read_log(path))[-1]["head"])
    assert check(path).lines == 6


@pytest.mark.parametrize("cut", [1, 5, 150])
def test_a_part_of_a_line_that_a_crash_left_is_removed(tmp_path, cut):
    path = filled(tmp_path, 5)
    before = path.read_bytes()
    with path.open("ab") as file:
        file.write(before.splitlines(keepends=True)[-1][:cut])
    with pytest.raises(StateError, match="line 6"):
        check(path)
    with closing(log_in(tmp_path)) as log:
        send(log, 6)
    assert path.read_bytes().startswith(before)
    assert check(path).lines == 6


@pytest.mark.parametrize("last", [b"no json\n", b"{}\n", b'{"kind":"witnessed"}\n', b"[" * 5000 + b"\n", b"x" * 70_000])
def test_a_last_line_of_any_content_is_refused_by_number_and_kept(tmp_path, last):
    path = filled(tmp_path, 5)
    with path.open("ab") as file:
        file.write(last)
    before = path.read_bytes()
    with closing(log_in(tmp_path)) as log, pytest.raises(StateError) as found:
        send(log, 6)
    assert found.value.number == 515
    assert path.read_bytes() == before
    with pytest.raises(StateError, match="line 6"):
        check(path)


def test_two_processes_do_not_write_one_log(tmp_path):
    with closing(log_in(tmp_path)) as first, closing(log_in(tmp_path)) as second:
        send(first, 1)
        with pytest.raises(StateError) as found:
            send(second, 1)
        assert found.value.number == 503


def test_a_full_disk_is_an_error_before_anything_leaves(tmp_path, monkeypatch):
    with closing(ExitLog(tmp_path / "missing" / "x" / "log", DIGEST, tmp_path)) as log:
        (tmp_path / "missing").touch()
        with pytest.raises(StateError) as found:
            send(log, 1)
        assert found.value.number == 501


def edit(line: dict) -> dict:
    return {**line, "rows": (line.get("rows") or 0) + 1}


def rechained(lines: list[dict], start: int) -> list[dict]:
    """Heads computed anew from a line on, as by somebody who knows how."""
    from nightsplit.site_worker.trust.exit_log import next_head

    head = lines[start - 1]["head"] if start else DIGEST
    for number in range(start, len(lines)):
        line = {**lines[number], "line": number + 1}
        line.pop("head")
        head = next_head(head, line)
        lines[number] = {**line, "head": head}
    return lines


def write(path, lines: list[dict]) -> None:
    path.write_bytes(b"".join(json.dumps(line, separators=(",", ":")).encode() + b"\n" for line in lines))


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.campaign)])
def test_every_change_of_a_long_log_is_found_and_named(tmp_path, count):
    """docs/explanation/attacks.md, acceptance 10: edit, delete, insert, exchange."""
    path = filled(tmp_path, count)
    lines = list(read_log(path))
    assert check(path).lines == len(lines)
    for place in sorted({0, 1, len(lines) // 3, len(lines) // 2, len(lines) - 2}):
        changes = {
            "edit": [*lines[:place], edit(lines[place]), *lines[place + 1 :]],
            "delete": lines[:place] + lines[place + 1 :],
            "insert": [*lines[:place], lines[place], *lines[place:]],
            "exchange": [*lines[:place], lines[place + 1], lines[place], *lines[place + 2 :]],
        }
        for change, changed in changes.items():
            write(path, changed)
            with pytest.raises(StateError) as found:
                check(path)
            assert found.value.number == 515, change
            assert f"line {place + 1 + (change == 'insert')} " in found.value.sentence, change


def test_a_log_whose_heads_were_computed_anew_does_not_fit_its_signatures(tmp_path):
    path = filled(tmp_path, 200)
    lines = list(read_log(path))
    write(path, rechained([*lines[:10], edit(lines[10]), *lines[11:]], 10))
    with pytest.raises(StateError, match="signature of another log"):
        check(path)


def test_a_log_that_was_cut_has_fewer_lines_than_the_server_signed(tmp_path):
    """The server holds the number and head of its last signature (report.json, and E617 at the next hello)."""
    path = filled(tmp_path, 200)
    lines = list(read_log(path))
    write(path, lines[:100])
    assert check(path).lines == 100
    assert check(path).witnessed == 64
    with closing(log_in(tmp_path)) as log:
        assert log.synced_head() == (100, lines[99]["head"])


@pytest.mark.parametrize("case", ["another key", "another site", "no key"])
def test_a_signature_that_is_not_the_servers(tmp_path, case):
    path = filled(tmp_path, 3)
    with closing(log_in(tmp_path)) as log:
        other = Identity(secrets.token_bytes(32))
        log.witness(
            signed(log, other if case == "another key" else SERVER_KEY, "south" if case == "another site" else "north")
        )
    with pytest.raises(StateError, match="not signed by the server"):
        verify(path, DIGEST, "north", None if case == "no key" else SERVER_KEY.public)
