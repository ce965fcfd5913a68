"""Move of an unfinished run from one broker to another, while its workers stand still.

    lock of the state folder ─▶ lease of the run ─▶ no site reports ─▶ transfer of each queue ─▶ no site reports

With lock and lease the move takes the place of the server, which therefore cannot start meanwhile. The run store
is not moved, and no queue is deleted: a worker that still has the old address leaves its messages there, and a
further move brings them over.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

from nightsplit.broker.topology import query_queues
from nightsplit.broker.transfer import transfer
from nightsplit.console.ui.text import counted
from nightsplit.console.worker_file import WorkerFile
from nightsplit.server_worker.config import ServerSection
from nightsplit.server_worker.lease import TTL_SECONDS, Lease, lease_owner
from nightsplit.shared.errors import BrokerError, ConfigError, RunError
from nightsplit.shared.foreign import shown
from nightsplit.shared.run_store.base import RunStore
from nightsplit.shared.runtime.process import lock_folder
from nightsplit.shared.transport import Queue


def move_run(old: WorkerFile, new: WorkerFile) -> None:
    """Move all messages of a run from the broker of one server.toml to the broker of another.

    Raises:
        ConfigError: 103 a file is a site's, or the files name different runs.
        StateError: 503 the server is running, or another move.
        RunError: 605 the old broker has no queue of the run.
        BrokerError: 207 the run store cannot be reached, 214 a worker is running; others as `transfer`.
    """
    _expect_one_run(old, new)
    with lock_folder(old.state_folder), closing(old.open_store()) as store, _leased(old, store) as lease:
        _expect_no_site(old, store)
        source, target = old.open_broker(), new.open_broker()
        queues = {site: [q for q in _queues(old, site) if source.depth(q) is not None] for site in old.sites}
        if not any(queues.values()):
            sentence = f"the broker of {old.path} has no queue of run {old.run_config.run.id!r}."
            raise RunError(605, sentence, "name the server.toml with the broker that has the run.")
        full: list[BrokerError] = []
        for site, present in queues.items():
            target.declare(present)
            moved = 0
            for queue in present:
                try:
                    for number in transfer(queue, source, target, "move"):
                        moved += number
                        lease.renew(store)
                        lease.check()
                except BrokerError as error:
                    if error.number != 209 or queue.name not in error.sentence:
                        raise
                    full.append(error)  # the others go on: the workers need them to make room
            print(f"{site}: {counted(moved, 'message')} moved")
        _expect_no_site(old, store)
        if full:
            remedy = f"let the server make room with {new.path}, without this queue's site; stop it, then move again."
            raise BrokerError(209, full[0].sentence, remedy)
    address = new.config.broker.rpartition("@")[2]  # without user and password
    print(shown(f"run {old.run_config.run.id} is now at {address}"))
    print(shown(f"server: start it with {new.path}"))
    print("sites: name this address, with the site's own user, as broker in site.toml; then start")


def _expect_one_run(old: WorkerFile, new: WorkerFile) -> None:
    for file in (old, new):
        if not isinstance(file.config, ServerSection):
            raise ConfigError(103, f"{file.path}: has no [server].", "name a server.toml.")
    if new.run_config.digest != old.run_config.digest:
        sentence = f"{new.path}: server.run: another run than that of {old.path}."
        raise ConfigError(103, sentence, "name the same run.toml in both.")


def _queues(file: WorkerFile, site: str) -> list[Queue]:
    """Return the queues of a site, each once: those of training, and those of queries."""
    training, queries = file.queues()[site], file.queues(query_queues)[site]
    return [*training, queries.up, queries.down]


@contextmanager
def _leased(file: WorkerFile, store: RunStore) -> Iterator[Lease]:
    """Hold the lease of the run, in place of the server."""
    lease = Lease(store, lease_owner(file.state_folder, locked=True))
    if not lease.acquire(_patience()):
        raise _in_use("another server, with another state folder")
    try:
        yield lease
    finally:
        lease.release()


def _expect_no_site(file: WorkerFile, store: RunStore) -> None:
    """Wait until no site reports; one that was killed counts as running for some seconds."""
    wait = _patience()
    while running := [site for site, status in store.statuses(file.sites).items() if status.online]:
        if not wait(0.5):
            raise _in_use(", ".join(running))


def _patience() -> Callable[[float], bool]:
    """Return a function that sleeps, and returns False when a worker that was killed no longer counts as running."""
    deadline = time.monotonic() + TTL_SECONDS

    def wait(seconds: float) -> bool:
        time.sleep(seconds)
        return time.monotonic() < deadline

    return wait


def _in_use(workers: str) -> BrokerError:
    return BrokerError(214, f"still running: {workers}.", "stop all workers of the run, then try again.")
