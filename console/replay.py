"""Replay of a run: trains the server's part again from the tape, and compares it with the run's results.

    tape ──▶ Player ──deliveries──▶ engine ──▶ a fresh server role ──▶ sha256 of its weights
             discarded ◀──answers──┘

Engine and role are those of the run. Where timing decided the order, they follow the run's order journal.
"""

import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from typing_extensions import override

from nightsplit.broker.topology import site_queues
from nightsplit.console.worker_file import WorkerFile
from nightsplit.server_worker.config import ServerSection
from nightsplit.server_worker.protocols import AnyServer, make_server_role
from nightsplit.server_worker.tape import FOLDER, read_tape
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


def replay_and_compare(file: WorkerFile, until: int | None) -> dict[str, Any]:
    """Replay a run up to position `until` as `Replay.run`, and return the result as plain data.

    `equal` is None if the replay stopped before the end: there is nothing to compare with.

    Raises:
        ConfigError: 103 the file is a site's.
        StateError: 507 the run has no tape, 508 the tape lacks a message.
    """
    server = file.config
    if not isinstance(server, ServerSection):
        raise ConfigError(103, f"{file.path}: has no [server].", "name the server.toml: the tape is at the server.")
    prepare_torch(server.threads, server.device)
    with closing(file.open_store()) as store:
        replay = Replay(file.run_config, file.run_folder, file.state_folder / FOLDER, store, server.device)
        replay.run(until)
    best, last = replay.weights()
    finished = replay.engine.finished
    recorded_best, recorded_last = _recorded(file, replay.role) if finished else (None, None)
    return {
        "run": file.run_config.run.id,
        "messages": replay.player.played,
        "position": replay.engine.position,
        "finished": finished,
        "last": asdict(replay.last) if replay.last else None,
        "sha256": {
            "best": {"replayed": best, "recorded": recorded_best},
            "last": {"replayed": last, "recorded": recorded_last},
        },
        "equal": (best, last) == (recorded_best, recorded_last) if finished else None,
    }


def _recorded(file: WorkerFile, role: AnyServer) -> tuple[str | None, str | None]:
    """Return the sha256 of the report's best weights and of the newest checkpoint's weights; None if missing."""
    assert isinstance(file.config, ServerSection)
    best = None
    with suppress(OSError, ValueError):
        report = (file.base / file.config.report / "report.json").read_text(encoding="utf-8")
        best = json.loads(report).get(f"{spec_of(file.run_config).names.weights}_sha256")
    found = Checkpoints(file.state_folder / "checkpoints").load()
    return best, weights_sha256(role.weights_in(found[1])) if found else None


@dataclass(frozen=True, slots=True)
class Applied:
    """An applied message.

    Attributes:
        message: its id.
        loss: loss of the training step; None without a step, or if only the site knows it.
        refused: error of a refused message, which counts as applied.
    """

    message: str
    loss: float | None
    refused: str | None


class Replay:
    """Replay of a run from its beginning.

    `base` and `tape` are the folders of run.toml and of the tape, `device` is that of the server's layers in the run;
    of the run store only the order journal is read.

    Attributes:
        role, engine: the server's role in training and its engine, set by `run`.
        player: link that delivers the tape.
        last: the last applied message.
    """

    role: AnyServer
    engine: Engine

    def __init__(self, config: RunConfig, base: Path, tape: Path, store: RunStore, device: str) -> None:
        self._config, self._base, self._tape, self._device = config, base, tape, device
        self._order = _Order(store, tape)
        self.player = _Player(tape)
        self._loss: float | None = None
        self.last: Applied | None = None

    def run(self, until: int | None = None) -> None:
        """Replay to the end of the run, or stop before.

        Args:
            until: position to stop at (`Engine.position`): number of messages of all sites that are applied in
                their sequence, refused ones included. The work of a role after its last message (split_frozen
                trains then) is not done if the replay stops there.

        Raises:
            StateError: 507 there is no tape, 508 it lacks the next message.
        """
        with TemporaryDirectory(prefix="nightsplit-replay-") as scratch:
            self.role = role = make_server_role(self._config, Path(scratch), self._base, self._device)
            run, wire = self._config.run, self._config.wire
            queues = {site: site_queues(run.id, site, wire.queue_bytes) for site in run.sites}
            routes = {site: Route(outgoing=q.down, incoming=q.up, dead=q.dead) for site, q in queues.items()}
            mailbox = Mailbox(run.id, SERVER, self.player, routes, role.payload, wire.message_bytes)
            checkpoints = Checkpoints(Path(scratch) / "checkpoints")
            checkpoints.interval_seconds = math.inf
            self.engine = engine = Engine(role, mailbox, checkpoints, self._order, self._record)
            engine.start()
            while not engine.finished and (until is None or engine.position < until):
                # A role that has all its messages may have work of its own (split_frozen).
                if not self._step() and self.player.at_end and not role.done:
                    raise self._missing_message()

    def weights(self) -> tuple[str | None, str]:
        """Return the sha256 of the best weights (None: no epoch was evaluated) and of the last ones."""
        best = self.role.best_weights
        return weights_sha256(best) if best else None, weights_sha256(self.role.weights())

    def _step(self) -> bool:
        """Apply at most one message; return whether the engine did any work."""
        before, self._loss = self.engine.last, None
        worked = self.engine.step(0.0)
        last = self.engine.last
        if last is not None and last is not before:
            self.last = Applied(last.header.message_id, self._loss, str(last.refusal) if last.refusal else None)
        return worked

    def _record(self, record: Record) -> None:
        loss = record.metrics.get("loss")
        if record.metrics["event"] == "train" and isinstance(loss, float):
            self._loss = loss

    def _missing_message(self) -> StateError:
        missing = []
        for site in self.role.awaited():
            due = self.role.applied[site] + 1
            if site not in self.role.sequences:
                missing.append(f"a hello of {site} that fits run.toml")
            elif site not in self.engine.ready:
                missing.append(f"message {due} of {site}")
        damaged = f" Damaged: {', '.join(self.player.damaged)}." if self.player.damaged else ""
        what = " and ".join(missing) or "the message that the order journal names next"
        return _incomplete(self._tape, self.engine.position, f"{what} is missing.{damaged}")


def _incomplete(tape: Path, position: int, reason: str) -> StateError:
    remedy = f"restore it from a copy; or replay only its beginning: --until {position}."
    return StateError(508, f"{tape} ends at position {position}: {reason}", remedy)


@dataclass(frozen=True)
class _Order(SoleWriter):
    """Order journal of the run, read-only."""

    store: RunStore
    tape: Path

    @override
    def journal_entry(self, position: int) -> str | None:
        return self.store.journal_entry(position)

    @override
    def claim_position(self, position: int, entry: str) -> str:
        # Beyond the end of the journal, the run's order is unknown.
        reason = f"the order journal in the run store ends there, although a message of {entry} follows."
        raise _incomplete(self.tape, position - 1, reason)


class _Player(Link):
    """Link that delivers a tape, and confirms and discards published messages.

    Attributes:
        played: number of deliveries so far, hellos and duplicates included.
        at_end: the tape has no more deliveries.
        damaged: entries that could not be read so far.
    """

    unconfirmed = frozenset[str]()
    prefetch = 2**16  # enough for any disorder of the tape; the engine writes a checkpoint after a quarter of it

    def __init__(self, tape: Path) -> None:
        self.played = 0
        self.at_end = False
        self.damaged: list[str] = []
        self._tape = read_tape(tape, self.damaged)
        self._confirmed: deque[str] = deque()
        self._again: deque[Delivery] = deque()
        self._pauses = False

    @override
    def receive(self, timeout: float) -> Event | None:
        # Confirms first; after a delivery None, so that the engine applies it before the next one.
        if self._confirmed:
            return Confirmed(self._confirmed.popleft())
        if self._pauses:
            self._pauses = False
            return None
        if self._again:
            return self._again.popleft()
        delivery = next(self._tape, None)
        if delivery is not None:
            self.played, self._pauses = self.played + 1, True
            delivery = replace(delivery, tag=delivery.body)
        self.at_end = delivery is None
        return delivery

    @override
    def publish(
        self, queue: Queue, message_id: str, body: Sequence[bytes | memoryview], headers: Mapping[str, str] = {}
    ) -> None:
        self._confirmed.append(message_id)

    @override
    def acknowledge(self, delivery: Delivery) -> None:
        pass

    @override
    def give_back(self, delivery: Delivery) -> None:
        assert isinstance(delivery.tag, bytes)
        self._again.append(replace(delivery, body=delivery.tag))

    @override
    def raise_prefetch(self, prefetch: int) -> None:
        self.prefetch = prefetch

    @override
    def close(self) -> None:
        pass
