"""A worker's status: what it does, what it has done, and what the server knows of each site.

Every worker writes its own, once a second, and whoever may read the run store reads it. So a record is
foreign input: it has one schema, ranges and a limit of its size, and one that breaks them is `UNREADABLE`
to its reader, never an error. For the same reason nothing of a patient is ever written here: `detail` is
our own words, names of queues and hosts, or the heading of an error, which quotes nothing.
"""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from nightsplit.shared.wire.message import SERVER

SITE_BYTES = 16 * 2**10
"""A longer record of a site is not read."""
SERVER_BYTES = 4 * 2**20
"""Likewise of the server, which tells some 300 bytes of each site."""
DETAIL_CHARS = 400

Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Seconds = Annotated[float, Meta(ge=0.0)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Word = Annotated[str, Meta(max_length=200)]
Detail = Annotated[str, Meta(max_length=DETAIL_CHARS)]
Moment = Annotated[datetime, Meta(tz=True)]


class Phase(StrEnum):
    """The present state of a worker."""

    STARTING = "starting"
    """It reads its files and data."""
    WAITING = "waiting"
    """Not at work: `detail` says for what it waits, its shift or the server to open the run."""
    STANDBY = "standby"
    """A server that takes over when the active one is gone."""
    WORKING = "working"
    """Connected to the broker, and at work."""
    IDLE = "idle"
    """A site at work that has sent all that it may, and waits for the server's answers."""
    BLOCKED = "blocked"
    """The broker is away, or takes no messages for now; `detail` says why. The work goes on by itself."""
    AWAY = "away"
    """It left: its shift is over, or there was nothing more to do."""
    FINISHED = "finished"
    """It left, since the run is over."""
    FAILED = "failed"
    """It left with an error; `detail` is its number and title."""
    UNREADABLE = "unreadable"
    """No worker says this: its reader does, of a record that breaks the schema."""

    @property
    def has_left(self) -> bool:
        """Whether these are last words."""
        return self in (Phase.AWAY, Phase.FINISHED, Phase.FAILED)

    @property
    def at_work(self) -> bool:
        """Whether the work goes on; waiting for the next answer is a part of it."""
        return self in (Phase.WORKING, Phase.IDLE)


class Presence(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The silence of a site, and its last sign of life.

    Attributes:
        silent_seconds: how long the run has waited for it and the server has listened.
        beat: of its status that the server saw last.
        last_seen: when that was, by the server's clock; None for never.
    """

    silent_seconds: Seconds = 0.0
    beat: Word | None = None
    last_seen: Moment | None = None


class SiteStatus(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the server tells of one site.

    Attributes:
        applied: messages in sequence that were applied.
        queued: messages at the broker that are not applied yet; None: the site has not said.
        batches, samples: what the model learned from the site.
        share: of all training batches, 0 to 1.
        excluded_at: behind how many applied messages of all sites the run went on without it; None: it did not.
        loss, staleness: of its last training batch, where the server knows it.
        presence: its silence.
    """

    applied: Count = 0
    queued: Count | None = None
    batches: Count = 0
    samples: Count = 0
    share: Share = 0.0
    excluded_at: Count | None = None
    loss: float | None = None
    staleness: Count | None = None
    presence: Presence = Presence()

    @property
    def excluded(self) -> bool:
        """Whether the run goes on without it."""
        return self.excluded_at is not None

    @property
    def last_seen(self) -> datetime | None:
        """When the server heard the site last."""
        return self.presence.last_seen


class Round(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The open round of a run: its number, and since when it is open."""

    number: Count = 0
    opened: Moment | None = None


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a worker tells of itself. A count is None where the worker does not have it (yet).

    Attributes:
        phase, detail: what it does, and why.
        run, digest: of which run, and the hash of its settings.
        skipped_checkpoints: damaged checkpoints that were not used: name and reason of each.
        sent, confirmed: messages handed to the broker, and how many of them it holds.
        duplicates, refused: messages that came again, and those put into the dead letter queue.
        checkpoints: written by this process.
        planned: messages of the plan, a site's own; at the server of all sites, once all are known.
        answered, queued: of a site: messages with an answer; at the broker and not applied yet.
        beat: of a site, another one each time, so that the server knows that the site lives.
        server: of a site: how it finds the server.
        applied: messages in sequence, of all sites; the server's, as all that follow.
        steps, epoch: training steps; the last epoch that was judged.
        fence: number of the server's incarnation.
        loss, staleness: of the last training batch, where it has samples of several sites.
        lacking: sites that were silent for too long, where without them the quorum is not met.
        round: the open one.
        sites: what the server knows of each.
    """

    phase: Phase
    detail: Detail | None = None
    run: Word | None = None
    digest: Word | None = None
    skipped_checkpoints: tuple[Detail, ...] = ()
    sent: Count | None = None
    confirmed: Count | None = None
    duplicates: Count | None = None
    refused: Count | None = None
    checkpoints: Count | None = None
    planned: Count | None = None
    answered: Count | None = None
    queued: Count | None = None
    beat: Word | None = None
    server: Literal["online", "offline", "finished"] | None = None
    applied: Count | None = None
    steps: Count | None = None
    epoch: Count | None = None
    fence: Count | None = None
    loss: float | None = None
    staleness: Count | None = None
    lacking: tuple[Word, ...] = ()
    round: Round = Round()
    sites: dict[Word, SiteStatus] = {}


UNREADABLE = WorkerStatus(phase=Phase.UNREADABLE)
"""In place of a record that breaks the schema."""

_decoder = msgspec.json.Decoder(WorkerStatus)


def write_status(status: WorkerStatus) -> str:
    """The record of `status`: JSON."""
    return msgspec.json.encode(status).decode()


def read_status(record: bytes | str, worker: str) -> WorkerStatus:
    """The status in a record of `worker`; `UNREADABLE` where it breaks the schema or is too long."""
    if len(record) > most_bytes(worker):
        return UNREADABLE
    try:
        return _decoder.decode(record)
    except (msgspec.MsgspecError, ValueError, RecursionError):  # ValueError: bytes that are no text
        return UNREADABLE


def most_bytes(worker: str) -> int:
    """The longest record of `worker` that is read."""
    return SERVER_BYTES if worker == SERVER else SITE_BYTES


def brief(text: str) -> str:
    """Text as a `detail` may have it: not too long, and free of what UTF-8 cannot write."""
    return text[:DETAIL_CHARS].encode(errors="replace").decode()
