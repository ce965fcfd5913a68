"""Approval of a run by a person: its effects, the question, and the answer."""

import difflib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from nightsplit.console.ui.text import columns, screen
from nightsplit.shared.errors import ConfigError
from nightsplit.shared.protocols.spec import sketch
from nightsplit.shared.wire.message import FROM_SITES
from nightsplit.shared.wire.schema import TELLS
from nightsplit.site_worker.config import PolicyConfig
from nightsplit.site_worker.policy import check_policy, is_allowed, read_policy
from nightsplit.site_worker.trust.approval import Approval, Request


def decide(path: Path, overrides: Sequence[str], person: str | None, assume_yes: bool) -> int:
    """Show the run of a site.toml and have it approved, by `person` if one is given; return the exit code.

    Raises:
        ConfigError: 101-103 a file is wrong, 104 and 119 the code cannot be used, 108 the policy forbids the run.
        StateError: 501 the approval cannot be written.
    """
    request, console = Request.read(path, overrides), screen()
    with suppress(ConfigError):
        known = request.check()
        console.print(f"{request.run.run.id} is approved already, by {known.person} at {known.time:%Y-%m-%d %H:%M} UTC")
        return 0
    policy = read_policy(request.policy_file)
    _show_messages(request, policy, console)
    check_policy(policy, request.run, sketch(request.run), request.policy_file)
    console.print(f"The policy {request.policy_file} allows the run.", "", sep="\n")
    _show_model(request, console)
    _show_settings(request, console)
    if not assume_yes and _ask(f"Approve this run for {request.site}? [y/N] ").lower() not in ("y", "yes"):
        console.print("not approved; nothing was changed")
        return 1
    person = person or _ask("Name of the person who approves: ")
    if not person:
        console.print("not approved, without a name; nothing was changed")
        return 1
    request.approve(person)
    console.print(f"approved by {person}: {request.file}", soft_wrap=True)
    return 0


def _ask(question: str) -> str:
    """Return the answer; an empty one without a terminal."""
    try:
        return input(question).strip()
    except EOFError:
        print()
        return ""


def _show_messages(request: Request, policy: PolicyConfig, console: Console) -> None:
    run = request.run
    console.print(f"Run {run.run.id}, protocol {run.run.protocol}, digest {run.digest}", soft_wrap=True)
    console.print(f"Sites: {', '.join(run.run.sites)}", "", sep="\n")
    readers = "the server" if run.parties else "the server and administrators of the broker"
    console.print(f"{request.site} would send to the server; {readers} can read:")
    table = columns("information", "in messages", "policy")
    payloads = sketch(run).values()
    for reveals, meaning in TELLS.items():
        kinds = [payload.kind for payload in payloads if payload.kind in FROM_SITES and reveals in payload.reveals]
        if kinds:
            verdict = "allowed" if is_allowed(policy, reveals) else "FORBIDDEN"
            table.add_row(f"{reveals}: {meaning}", ", ".join(kinds), verdict)
    console.print(table)
    if setting := [payload.kind for payload in payloads if payload.sets_weights]:
        verdict = "allowed" if policy.server_sets_weights else "FORBIDDEN"
        console.print(f"The server would replace weights of the site's layers, by {', '.join(setting)}: {verdict}")
    if run.run.tape:
        console.print(f"The server would keep every message: {'allowed' if policy.tape else 'FORBIDDEN'}")
    console.print()


def _show_model(request: Request, console: Console) -> None:
    model, code, last = request.run.model, request.code, request.last
    settings = ", ".join(f"{key} = {json.dumps(value)}" for key, value in model.settings.items())
    console.print(f"Network: {model.factory}({settings})", soft_wrap=True)
    if model.initial is not None:
        console.print(f"Initial weights: {model.initial}, sha256 {model.initial_sha256}", soft_wrap=True)
    console.print(f"Code: {code.version or 'of nightsplit itself'}", soft_wrap=True)
    if code.text is not None:
        before = last.text if last is not None else None
        _show_change("code", before, code.text, last, console)
    console.print()


def _show_settings(request: Request, console: Console) -> None:
    last, now = request.last, _settings(request.run.canonical())
    _show_change("settings", _settings(last.settings) if last is not None else None, now, last, console)
    console.print()


def _show_change(what: str, before: str | None, now: str, last: Approval | None, console: Console) -> None:
    """Print a text, or its difference from the one that was approved last."""
    lines = now.splitlines()
    if before is None or last is None:
        console.print(f"All {what}:")
    elif before == now:
        console.print(f"No change of the {what} since {last.run}, approved by {last.person}.", soft_wrap=True)
        return
    else:
        console.print(f"Changes of the {what} since {last.run}, approved by {last.person}:", soft_wrap=True)
        lines = list(difflib.unified_diff(before.splitlines(), lines, "approved", "now", lineterm=""))
    for line in lines:
        console.print(f"  {line.expandtabs()}", soft_wrap=True)


def _settings(canonical: str) -> str:
    """Return a run's configuration, one key per line."""
    tables = json.loads(canonical)
    return "\n".join(
        f"{table}.{key} = {json.dumps(value)}" for table, keys in tables.items() for key, value in (keys or {}).items()
    )
