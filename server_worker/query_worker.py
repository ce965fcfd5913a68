"""Server worker for queries to the model of a finished run."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path

from nightsplit.broker.connect import open_broker
from nightsplit.broker.sealed import sealed
from nightsplit.broker.topology import query_queues
from nightsplit.server_worker.config import ServerConfig
from nightsplit.server_worker.query.pool import evaluation_pool
from nightsplit.server_worker.query.server import QueryServer
from nightsplit.shared.config.load import load
from nightsplit.shared.engine.mailbox import Mailbox
from nightsplit.shared.errors import StateError
from nightsplit.shared.he.sequences import parameters_for
from nightsplit.shared.protocols.he_clstm import classifier_of, load_trained, stages_of
from nightsplit.shared.protocols.query import CHUNKS_MAX, CONTRACT
from nightsplit.shared.run_store.status import Phase
from nightsplit.shared.runtime.process import StopSignal, prepare_torch, try_lock_folder
from nightsplit.shared.runtime.worker import Worker
from nightsplit.shared.storage.files import make_private_folder, make_secret_file, read_secret_file
from nightsplit.shared.transport import Route
from nightsplit.shared.wire.message import SERVER

WEIGHTS = ("top.safetensors", "model.safetensors")
"""Weight files of the last stage: after a split run, or after rounds."""


class QueryServerWorker(Worker):
    """Query server of a run, which evaluates in `server.threads` processes. A run may have several.

    Those with the same state folder share the public keys, and can continue each other's queries. `path` is the
    server.toml of the finished run; ConfigError if a file is wrong, or (105) its model cannot work on ciphertexts.
    """

    def __init__(self, path: Path, overrides: Sequence[str] = (), stop: StopSignal | None = None) -> None:
        self.config = load(path, ServerConfig).server
        super().__init__(path.parent, SERVER, self.config, overrides, None, stop, lambda status: None)
        _, self._last_stage = stages_of(self.run_config, self.run_folder)
        self.answered = 0
        """Queries so far, each step counted."""

    def work(self, idle_seconds: float | None = None) -> None:
        """Answer queries in its shifts, until it is stopped or `idle_seconds` pass without a message."""
        prepare_torch(1, "cpu")
        load_trained(self._last_stage, self.base / self.config.report, WEIGHTS)
        classifier, secret = classifier_of(self._last_stage), self._secret()
        ckks, secret_name = parameters_for(classifier), hashlib.sha256(secret).hexdigest()
        config, processes = self.run_config, self.config.threads
        keys, limit = self.state_folder / "keys", config.wire.message_bytes
        broker = open_broker(self.config.broker, self.base, limit, self.credentials)
        queues = {site: query_queues(config.run.id, site, config.wire.queue_bytes) for site in config.run.sites}
        broker.declare(queue for site in config.run.sites for queue in queues[site])
        routes = {site: Route(outgoing=q.down, incoming=q.up, dead=q.dead) for site, q in queues.items()}
        incoming = [route.incoming for route in routes.values()]
        with self._unique_name() as owner:
            while self.wait_for_shift():
                with (
                    evaluation_pool(classifier, secret, processes) as evaluate,
                    broker.link(incoming, (processes + 1) * CHUNKS_MAX, owner) as plain,
                ):
                    self.enter(Phase.WORKING, "answering queries")
                    link = sealed(plain, self.sealer, SERVER, routes, seals=False)
                    mailbox = Mailbox(config.run.id, SERVER, link, routes, CONTRACT.get, config.content_bytes)
                    server = QueryServer(mailbox, ckks, evaluate, secret_name, keys)
                    try:
                        server.run(self.off_duty, idle_seconds)
                    finally:
                        self.answered += server.answered
                if idle_seconds is not None:
                    return

    @contextmanager
    def _unique_name(self) -> Iterator[str]:
        """Reserve a name for this process; after a crash it gets its old one again, and with it its queues."""
        with ExitStack() as locks:
            for number in count(1):
                folder = self.state_folder / f"answering-{number}"
                if locks.enter_context(try_lock_folder(folder)):
                    yield f"{SERVER}:{folder.resolve()}"
                    return

    def _secret(self) -> bytes:
        """Return the secret of the blinding, created once for all processes that answer."""
        path = self.state_folder / "blinding.key"
        make_private_folder(self.state_folder)
        with suppress(FileExistsError):
            make_secret_file(path)
        try:
            return read_secret_file(path)
        except ValueError as error:
            fix = f"chmod 600 {path}, or restore it, or delete it: queries then begin again."
            raise StateError(511, f"{path} {error}.", fix) from None
