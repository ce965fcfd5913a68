"""nightsplit open: the queues of a run, and its configuration in them."""

from nightsplit.console.options import Overrides, ServerFile


def open_run(file: ServerFile, overrides: Overrides = []) -> int:
    """Open a run, so that sites can begin without a server.

    Make the queues of a run at the broker and put its configuration into them. Sites can then work a whole
    night before any server runs. It may be repeated.
    """
    from nightsplit.console.watch import Watch
    from nightsplit.server_worker.worker import ServerWorker
    from nightsplit.shared.run_store.status import Phase, WorkerStatus
    from nightsplit.shared.wire.message import SERVER

    watch = Watch()

    def observe(status: WorkerStatus) -> None:
        if status.phase is Phase.STANDBY:  # all else is over in a moment
            watch.observe(status)

    worker = ServerWorker(file, overrides, stop=watch.stop, observe=observe)
    run = worker.run_config.run

    def opened() -> bool:
        worker.open_run()
        return not watch.stop.requested

    return watch.over(SERVER, worker, opened, f"run {run.id} is open; {', '.join(run.sites)} may begin")
