"""nightsplit replay: the training of a recorded run, repeated."""

import json
from typing import Annotated

from typer import Option

from nightsplit.console.options import AsJson, Overrides, ServerFile


def replay(
    file: ServerFile,
    overrides: Overrides = [],
    until: Annotated[int | None, Option(metavar="POSITION", help="stop at this position of the order")] = None,
    as_json: AsJson = False,
) -> int:
    """Train a recorded run again, and compare.

    Train the server's part again from the tape of a run (tape = true in run.toml), and compare its sha256 with
    the report's. Exit code 1 if they differ. A position counts the order's entries: messages of all sites,
    exclusions and closed rounds; position 0 is the untrained model. Nothing is sent, and the run is not changed.
    """
    from nightsplit.console.replay import replay_and_compare
    from nightsplit.console.ui.text import counted, screen
    from nightsplit.console.worker_file import WorkerFile

    summary = replay_and_compare(WorkerFile(file, overrides), until)
    if as_json:
        print(json.dumps(summary, indent=2))
        return int(summary["equal"] is False)  # None: stopped early, so there is nothing to compare with
    console = screen()
    end = ", the end of the run" if summary["finished"] else ""
    played = counted(summary["messages"], "message")
    console.print(f"{summary['run']}: {played} replayed, position {summary['position']}{end}")
    if summary["last"] is not None:
        console.print("last applied: " + ", ".join(f"{k} {v}" for k, v in summary["last"].items() if v is not None))
    for part, found in summary["sha256"].items():
        console.print(f"{part} weights: {found['replayed'] or 'none was evaluated'}", soft_wrap=True)
        if summary["finished"]:
            verdict = "equal" if found["replayed"] == found["recorded"] else "NOT EQUAL"
            where = {"best": "report", "last": "checkpoint"}[part]
            console.print(f"  in the {where}: {found['recorded'] or 'nothing'}: {verdict}", soft_wrap=True)
    return int(summary["equal"] is False)
