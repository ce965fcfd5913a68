"""nightsplit status: the state of a run, a line per worker."""

import json

from nightsplit.console.options import AsJson, EitherFile, Overrides


def status(file: EitherFile, overrides: Overrides = [], as_json: AsJson = False) -> None:
    """Show the state of a run.

    Show each worker's state and counts. Nothing is changed, and no worker has to be online.
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
    counts = (*COUNTS, "batches")
    table = columns("worker", "state", *counts, "share", "last report", numbers=(*counts, "share"))
    for line in summary["workers"]:
        cells = ["-" if line[name] is None else str(line[name]) for name in counts]
        share = "-" if line["share"] is None else f"{100 * line['share']:.0f} %"
        age = line["age_seconds"]
        last = "never" if age is None else f"{duration(age)} ago" if age >= 2 else "now"
        table.add_row(line["worker"], in_words(line), *cells, share, last)
    console.print(table)
    for line in summary["workers"]:
        if line["skipped_checkpoints"]:
            damaged = "; ".join(line["skipped_checkpoints"])
            console.print(f"warning: {line['worker']} skipped a damaged checkpoint: {damaged}")
    for site, queued in summary["queries"].items():
        if queued["ask"] is not None:  # there are queues for queries
            to_server = counted(queued["ask"], "message")
            console.print(f"encrypted queries of {site}: {to_server} for the server, {queued['answer']} for the site")
    if summary["broker"] is not None:  # the error, if it could not be asked
        console.print(summary["broker"])
