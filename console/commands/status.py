"""nightsplit status: a line per worker."""

import json

from nightsplit.console.options import AsJson, EitherFile, Overrides


def status(file: EitherFile, overrides: Overrides = [], as_json: AsJson = False) -> None:
    """Show how a run stands.

    Show each worker's state and counts. It changes nothing, and works while nobody is online.
    """
    from nightsplit.console.status import COUNTS, in_words, summarise
    from nightsplit.console.ui.text import columns, counted, duration, screen
    from nightsplit.console.worker_file import WorkerFile

    summary = summarise(WorkerFile(file, overrides))
    if as_json:
        print(json.dumps(summary, indent=2))
        return
    console = screen()
    console.print(f"{summary['run']}: {summary['sentence']}", style="bold")
    table = columns("worker", "state", *COUNTS, "batches", "share", "last heard", numbers=[*COUNTS, "batches", "share"])
    for line in summary["workers"]:
        counts = ["-" if line[name] is None else str(line[name]) for name in COUNTS]
        age = line["age_seconds"]
        heard = "never" if age is None else f"{duration(age)} ago" if age >= 2 else "now"
        batches = "-" if line["batches"] is None else str(line["batches"])
        share = "-" if line["share"] is None else f"{100 * line['share']:.0f} %"
        table.add_row(line["worker"], in_words(line), *counts, batches, share, heard)
    console.print(table)
    for line in summary["workers"]:
        if line["skipped_checkpoints"]:
            damaged = "; ".join(line["skipped_checkpoints"])
            console.print(f"warning: {line['worker']} skipped a damaged checkpoint: {damaged}")
    for site, waiting in summary["queries"].items():
        if waiting["ask"] is not None:
            asked, answered = counted(waiting["ask"], "message"), waiting["answer"]
            console.print(f"encrypted queries of {site}: {asked} for the server, {answered} for the site")
    if summary["broker"] is not None:
        console.print(summary["broker"])
