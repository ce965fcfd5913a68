"""nightsplit server: the worker with the server's part of the model."""

from nightsplit.console.options import IdleSeconds, LogFormat, Overrides, ServerFile


def server(
    file: ServerFile, overrides: Overrides = [], idle_seconds: IdleSeconds = None, log_format: LogFormat = "text"
) -> int:
    """Train the server's part of the model.

    Train on the sites' queued messages, and queue the answers. The server may be stopped at any time; start
    the same command again to continue.
    """
    from nightsplit.console.watch import Watch
    from nightsplit.server_worker.stream.ddp import is_helper
    from nightsplit.server_worker.worker import ServerWorker
    from nightsplit.shared.wire.message import SERVER

    watch = Watch(log_format)
    worker = ServerWorker(file, overrides, stop=watch.stop, observe=watch.observe)
    if is_helper():
        watch.stop.install()  # it has no other signal: a helper stops with its server
        worker.help()
        return 0
    end = f"run {worker.run_config.run.id} is finished; report in {worker.report_folder}"
    return watch.run(SERVER, worker, lambda: worker.work(idle_seconds), end)
