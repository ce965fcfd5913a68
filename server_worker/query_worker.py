"""The server worker for queries to the model of a finished run."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path

from broker.opening import open_broker
from broker.topology import query_queues
from server_worker.answering import Answering
from server_worker.protocols.he_clstm import HeClstmServer
from shared.clock import Clock
from shared.config import ServerConfig
from shared.config_file import load
from shared.errors import RunError
from shared.message import SERVER
from shared.protocols.he_clstm import fill, judge_of, stages_of
from shared.protocols.query import MOST_CHUNKS
from shared.route import Route
from shared.shift_worker import ShiftWorker
from shared.worker import Facts, StopSignal, locked_folder, prepare_torch

SECRET_BYTES = 32


class QueryServerWorker(ShiftWorker):
    """One server process; others may work for the same run, with the same state folder.

    Args:
        path: server.toml of the finished run.
        overrides, clock, stop, observe: as for `ServerWorker`.

    Raises:
        ConfigError: a file is wrong, or (105) the run's model cannot work on ciphertexts.
    """

    def __init__(
        self,
        path: Path,
        overrides: Sequence[str] = (),
        clock: Clock | None = None,
        stop: StopSignal | None = None,
        observe: Callable[[Facts], None] = lambda facts: None,
    ) -> None:
        self.config = load(path, ServerConfig).server
        super().__init__(path.parent, self.config, overrides, clock, stop, observe)
        self._last = stages_of(self.run_config)[1]
        self._answering: Answering | None = None

    @property
    def answered(self) -> int:
        """Queries so far, each step counted."""
        return 0 if self._answering is None else self._answering.answered

    def work(self, idle_seconds: float | None = None) -> None:
        """Answer in its shifts, until it is asked to stop.

        Args:
            idle_seconds: leave when nothing came for so long; None to stay.

        Raises:
            NightsplitError: what the user has to know.
        """
        prepare_torch(self.config.threads, "cpu")
        fill(self._last, self._weights())
        half = HeClstmServer(judge_of(self._last), self._secret())
        config = self.run_config
        broker = open_broker(self.config.broker, self.base, config.wire.message_bytes, self.credentials)
        queues = {site: query_queues(config.run.id, site, config.wire.queue_bytes) for site in config.run.sites}
        broker.declare(queue for site in queues.values() for queue in site)
        routes = {site: Route(outgoing=q.down, incoming=q.up, dead=q.dead) for site, q in queues.items()}
        with self._own_name() as owner:
            while self.wait_for_shift():
                with broker.link([route.incoming for route in routes.values()], 2 * MOST_CHUNKS, owner) as link:
                    self.state = "answering queries"
                    self._answering = Answering(
                        config.run.id, link, routes, half, self.state_folder / "keys", config.wire.message_bytes
                    )
                    self._answering.run(self.off_duty, idle_seconds)
                if idle_seconds is not None:
                    return

    @contextmanager
    def _own_name(self) -> Iterator[str]:
        """A name that no other process has; one that starts again after a crash gets its old one, and its queues."""
        with ExitStack() as locks:
            for number in count(1):
                folder = self.state_folder / f"answering-{number}"
                if locks.enter_context(locked_folder(folder)):
                    yield f"{SERVER}:{folder.resolve()}"
                    return

    def _weights(self) -> Path:
        report = self.base / self.config.report
        for name in ("top", "model"):
            if (report / f"{name}.safetensors").exists():
                return report / f"{name}.safetensors"
        raise RunError(
            605,
            f"{report} has no trained model: {self.run_config.run.id} has not finished here.",
            "let the run finish first: nightsplit server server.toml.",
        )

    def _secret(self) -> bytes:
        """What the blinding is derived from; made once, readable by its owner alone."""
        path = self.state_folder / "blinding.key"
        self.state_folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        except FileExistsError:
            return path.read_bytes()
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(SECRET_BYTES))
            os.fsync(handle)
        return path.read_bytes()
