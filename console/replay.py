"""Trains the server's half again from a tape, and compares it with what the run left behind.

    tape ──▶ Player ──deliveries──▶ engine ──▶ a fresh server role ──▶ sha256 of its weights
             nothing leaves ◀──answers──┘

Engine and role are those of the run. Where timing decided the order, they follow the run's journal.
"""

import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nightsplit.broker.topology import site_queues
from nightsplit.console.worker_file import WorkerFile
from nightsplit.server_worker.config import ServerSection
from nightsplit.server_worker.protocols import AnyServer, make_server
from nightsplit.server_worker.tape import FOLDER, recorded
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.engine.effects import Record
from nightsplit.shared.engine.engine import Engine
from nightsplit.shared.engine.fencing import SoleWriter
from nightsplit.shared.engine.mailbox import Mailbox
from nightsplit.shared.errors import ConfigError, StateError
from nightsplit.shared.models.hashing import weights_sha256
from nightsplit.shared.protocols.spec import spec_of
from nightsplit.shared.run_store.base import RunStore
from nightsplit.shared.runtime.process import prepare_torch
from nightsplit.shared.storage.checkpoint import Checkpoints
from nightsplit.shared.transport import Confirmed, Delivery, Event, Link, Queue, Route
from nightsplit.shared.wire.message import SERVER


def summarise(file: WorkerFile, until: int | None) -> dict[str, Any]:
    """Replay a run, up to position `until` as `Replay.go` does; what came of it, as plain data.

    `equal` is None where the replay stopped before the end: the run left nothing to compare with.

    Raises:
        ConfigError: 103 the file is a site's.
        StateError: 507 the run has no tape, 508 a message that is needed is not on it.
    """
    server = file.config
    if not isinstance(server, ServerSection):
        raise ConfigError(103, f"{file.path}: has no [server].", "name the server.toml: the server holds the tape.")
    prepare_torch(server.threads, server.device)
    with closing(file.open_store()) as store:
        replay = Replay(file.run_config, file.run_folder, file.state_folder / FOLDER, store, server.device)
        replay.go(until)
    best, last = replay.weights()
    recorded_best, recorded_last = _left_behind(file, replay.role) if replay.finished else (None, None)
    return {
        "run": file.run_config.run.id,
        "messages": replay.player.played,
        "position": replay.position,
        "finished": replay.finished,
        "last": replay.last and asdict(replay.last),
        "sha256": {
            "best": {"replayed": best, "recorded": recorded_best},
            "last": {"replayed": last, "recorded": recorded_last},
        },
        "equal": (best, last) == (recorded_best, recorded_last) if replay.finished else None,
    }


def _left_behind(file: WorkerFile, role: AnyServer) -> tuple[str | None, str | None]:
    """sha256 of the best weights as reported, and of the last ones in the newest checkpoint; None if not there."""
    assert isinstance(file.config, ServerSection)
    best = None
    with suppress(OSError, ValueError):
        report = (file.base / file.config.report / "report.json").read_text(encoding="utf-8")
        best = json.loads(report).get(f"{spec_of(file.run_config).names.weights}_sha256")
    found = Checkpoints(file.state_folder / "checkpoints").load()
    return best, found and weights_sha256(role.weights_in(found[1]))


@dataclass(frozen=True, slots=True)
class Applied:
    """A message that was applied.

    Attributes:
        message: its id.
        loss: of the training step; None without a step, or where the site alone knows it.
        refused: why it was refused; it counts as applied.
    """

    message: str
    loss: float | None
    refused: str | None


class Replay:
    """A run once more, from its beginning.

    Args:
        config: the run.
        base: folder of run.toml.
        tape: its folder.
        store: only its journal is read.
        device: where the server's layers computed, and compute.

    Attributes:
        role: the server that is trained, from `go` on.
        player: of the tape.
        last: the last message that was applied.
    """

    role: AnyServer

    def __init__(self, config: RunConfig, base: Path, tape: Path, store: RunStore, device: str) -> None:
        self._config, self._base, self._tape, self._device = config, base, tape, device
        self._order = _Order(store, tape)
        self.player = _Player(tape)
        self._loss: float | None = None
        self._engine: Engine
        self.last: Applied | None = None

    def go(self, until: int | None = None) -> None:
        """Replay to the end of the run, or stop before.

        Args:
            until: position to stop at (`Engine.position`): so many messages of all sites together were
                applied in their sequence, refused ones included. What a role does behind the last
                message (split_frozen trains then) is not done when that is the place to stop.

        Raises:
            StateError: 507 there is no tape, 508 it lacks what comes next.
        """
        with TemporaryDirectory(prefix="nightsplit-replay-") as scratch:
            self.role = role = make_server(self._config, Path(scratch), self._base, self._device)
            run, wire = self._config.run, self._config.wire
            queues = {site: site_queues(run.id, site, wire.queue_bytes) for site in run.sites}
            routes = {site: Route(outgoing=q.down, incoming=q.up, dead=q.dead) for site, q in queues.items()}
            mailbox = Mailbox(run.id, SERVER, self.player, routes, role.payload, wire.message_bytes)
            self._engine = engine = Engine(
                role, mailbox, Checkpoints(Path(scratch) / "checkpoints"), self._order, self._record,
                interval_seconds=math.inf,
            )  # fmt: skip
            engine.start()
            while not engine.finished and (until is None or engine.position < until):
                # A role that has all its messages may have work of its own (split_frozen).
                if not self._step() and self.player.at_end and not role.done:
                    raise self._incomplete()

    @property
    def position(self) -> int:
        """As `Engine.position`."""
        return self._engine.position

    @property
    def finished(self) -> bool:
        """Whether the run's end was reached."""
        return self._engine.finished

    def weights(self) -> tuple[str | None, str]:
        """sha256 of the best weights (None: no epoch was judged) and of the last ones."""
        best = self.role.best_weights
        return weights_sha256(best) if best else None, weights_sha256(self.role.weights())

    def _step(self) -> bool:
        """One turn of the engine, which applies one message at most; whether there was anything to do."""
        before, self._loss = self._engine.last, None
        worked = self._engine.step(0.0)
        last = self._engine.last
        if last is not None and last is not before:
            self.last = Applied(last.header.message_id, self._loss, str(last.refusal) if last.refusal else None)
        return worked

    def _record(self, line: Record) -> None:
        loss = line.metrics.get("loss")
        if line.metrics["event"] == "train" and isinstance(loss, float):
            self._loss = loss

    def _incomplete(self) -> StateError:
        missing = []
        for site in self.role.awaited():
            due = self.role.applied[site] + 1
            if site not in self.role.sequences:
                missing.append(f"a greeting of {site} that fits run.toml")
            elif site not in self._engine.ready:
                missing.append(f"message {due} of {site}")
        damaged = f" Damaged: {', '.join(self.player.damaged)}." if self.player.damaged else ""
        what = " and ".join(missing) or "whom the order journal names next"
        return _tape_ends(self._tape, self.position, f"{what} is missing.{damaged}")


def _tape_ends(tape: Path, position: int, why: str) -> StateError:
    remedy = f"restore it from a copy; or replay what is there: --until {position}."
    return StateError(508, f"{tape} leads to position {position}: {why}", remedy)


@dataclass(frozen=True)
class _Order(SoleWriter):
    """The order that was written down where timing decided it; it is followed, and never written."""

    store: RunStore
    tape: Path

    def journalled(self, position: int) -> str | None:
        """See `Authority`."""
        return self.store.journalled(position)

    def journal(self, position: int, sender: str) -> str:
        """Raise StateError 508: where the journal ends, nobody knows what was applied next."""
        why = f"the order journal in the run store does not go on, though a message of {sender} is there."
        raise _tape_ends(self.tape, position - 1, why)


class _Player(Link):
    """A link that delivers a tape, and confirms what is published without sending it anywhere.

    Attributes:
        played: deliveries so far; greetings and copies are among them.
        at_end: whether there are no more.
        damaged: places of the tape that cannot be read, as far as it was played.
    """

    def __init__(self, tape: Path) -> None:
        self.played = 0
        self.at_end = False
        self.damaged: list[str] = []
        self._tape = recorded(tape, self.damaged)
        self._confirmed: deque[str] = deque()
        self._prefetch = 2**16
        self._pauses = False

    def receive(self, timeout: float) -> Event | None:
        """Confirms, then one delivery; None behind it, so that it is applied before the next one comes."""
        if self._confirmed:
            return Confirmed(self._confirmed.popleft())
        if self._pauses:
            self._pauses = False
            return None
        delivery = next(self._tape, None)
        self._pauses, self.at_end = delivery is not None, delivery is None
        self.played += self._pauses
        return delivery

    def publish(
        self, queue: Queue, message_id: str, body: Sequence[bytes | memoryview], headers: Mapping[str, str] = {}
    ) -> None:
        """Nothing leaves."""
        self._confirmed.append(message_id)

    def acknowledge(self, delivery: Delivery) -> None:
        """The tape forgets nothing."""

    @property
    def unconfirmed(self) -> frozenset[str]:
        """What is published counts as confirmed at once."""
        return frozenset()

    @property
    def prefetch(self) -> int:
        """So many messages may be out of order; a checkpoint, of which a replay needs none, is due after a quarter."""
        return self._prefetch

    def raise_prefetch(self, prefetch: int) -> None:
        """See `Link`."""
        self._prefetch = prefetch

    def close(self) -> None:
        """Nothing is held."""
