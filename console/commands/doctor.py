"""nightsplit doctor: checks of a worker before its night."""

import json
from dataclasses import asdict

from nightsplit.console.options import AsJson, EitherFile, Overrides


def doctor(file: EitherFile, overrides: Overrides = [], as_json: AsJson = False) -> int:
    """Check that a worker can do its work.

    Check files, data, model, broker, run store, disk, device and clock, and print the fix of each problem. No
    value of a patient is shown. Exit code 1 if a check failed.
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
