"""nightsplit open: the queues of a run with its configuration."""

from nightsplit.console.options import Overrides, ServerFile


def open_run(file: ServerFile, overrides: Overrides = []) -> int:
    """Open a run, so that sites can begin without a server.

    Create the queues of a run at the broker and put its configuration into them. Sites can then work a whole
    night before any server runs. Repeating it is harmless.
    """
    from nightsplit.console.watch import Watch
    from nightsplit.server_worker.worker import ServerWorker
    from nightsplit.shared.run_store.status import Phase, WorkerStatus
    from nightsplit.shared.wire.message import SERVER

    watch = Watch()

    def observe(status: WorkerStatus) -> None:
        if status.phase is Phase.STANDBY:  # opening takes only a moment
            watch.observe(status)

    worker = ServerWorker(file, overrides, stop=watch.stop, observe=observe)
    run = worker.run_config.run

    def opened() -> bool:
        worker.open_run()
        return not watch.stop.requested

    return watch.run(SERVER, worker, opened, f"run {run.id} is open; {', '.join(run.sites)} may begin")
