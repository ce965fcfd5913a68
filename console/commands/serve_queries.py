"""nightsplit serve-queries: the server for encrypted queries."""

import sys

from nightsplit.console.exit_codes import stopped
from nightsplit.console.options import IdleSeconds, Overrides, ServerFile


def serve_queries(file: ServerFile, overrides: Overrides = [], idle_seconds: IdleSeconds = None) -> int:
    """Evaluate the sites' encrypted sequences.

    Answer their queries with the trained model. The server decrypts nothing and keeps only public keys. It may
    be stopped at any time.
    """
    from nightsplit.console.ui.text import counted
    from nightsplit.shared.he import check_installed
    from nightsplit.shared.runtime.process import StopSignal

    check_installed()
    from nightsplit.server_worker.query_worker import QueryServerWorker

    stop = StopSignal()
    stop.install()
    worker = QueryServerWorker(file, overrides, stop=stop)
    worker.work(idle_seconds)
    print(f"{counted(worker.answered, 'message')} answered", file=sys.stderr)
    return stopped(stop) if stop.requested else 0
