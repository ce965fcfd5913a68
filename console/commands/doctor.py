"""nightsplit doctor: what could keep a worker from its work, found before the night and not in it."""

import json
from dataclasses import asdict

from nightsplit.console.options import AsJson, EitherFile, Overrides


def doctor(file: EitherFile, overrides: Overrides = [], as_json: AsJson = False) -> int:
    """Check that a worker can do its work.

    Look at files, data, model, broker, run store, disk, device and clock, and say for each problem how it is
    mended. No patient's value is shown. Exit code 1 when something failed.
    """
    from nightsplit.console.doctor.checks import examine
    from nightsplit.console.ui.text import columns, screen

    findings = examine(file, overrides)
    healthy = not any(finding.failed for finding in findings)
    if as_json:
        print(json.dumps({"ok": healthy, "checks": [asdict(finding) for finding in findings]}, indent=2))
        return int(not healthy)
    table = columns("", "check", "found", "fix")
    for finding in findings:
        mark = "FAILED" if finding.failed else "note" if finding.fix else "ok"
        table.add_row(mark, finding.check, finding.found, finding.fix or "")
    screen().print(table)
    return int(not healthy)
