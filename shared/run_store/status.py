"""Status of a worker: its phase, its counts, and the server's view of each site.

Every worker writes its own, once a second, and every reader of the run store can read it. So a record is
untrusted input with one schema, ranges and a limit of its size; one that breaks them is read as
`UNREADABLE`, never as an error. For the same reason no patient's data is written here: `detail` holds
texts of our own, names of queues and hosts, or the heading of an error, which quotes nothing.
"""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from nightsplit.shared.wire.message import SERVER

SITE_BYTES = 16 * 2**10
"""Longest record of a site that is read."""
SERVER_BYTES = 2**20
"""Longest record of the server that is read; each site takes some 300 bytes of it."""
DETAIL_CHARS = 400

Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Seconds = Annotated[float, Meta(ge=0.0)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Word = Annotated[str, Meta(max_length=200)]
Detail = Annotated[str, Meta(max_length=DETAIL_CHARS)]
Moment = Annotated[datetime, Meta(tz=True)]


class Phase(StrEnum):
    """Present state of a worker."""

    STARTING = "starting"
    """Reading files and data."""
    WAITING = "waiting"
    """Waiting for its shift, or for the server to open the run, as `detail` says."""
    STANDBY = "standby"
    """A server that takes over when the active one fails."""
    WORKING = "working"
    """Connected to the broker, and at work."""
    IDLE = "idle"
    """A site at work that has sent all that it may, and waits for the server's answers."""
    BLOCKED = "blocked"
    """The broker is away or accepts no messages, as `detail` says; the work resumes by itself."""
    AWAY = "away"
    """Stopped: its shift is over, or there was nothing more to do."""
    FINISHED = "finished"
    """Stopped, since the run is over."""
    FAILED = "failed"
    """Stopped with an error; `detail` is its number and title."""
    UNREADABLE = "unreadable"
    """Set by the reader of a record that breaks the schema."""

    @property
    def has_left(self) -> bool:
        """True if the worker has stopped."""
        return self in (Phase.AWAY, Phase.FINISHED, Phase.FAILED)

    @property
    def at_work(self) -> bool:
        """True if the worker makes progress; waiting for the next answer is a part of it."""
        return self in (Phase.WORKING, Phase.IDLE)


class Presence(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Silence of a site, and its last sign of life.

    Attributes:
        silent_seconds: time during which the run waited for it and the server listened.
        beat: `beat` of its status that the server saw last.
        last_seen: time of that, by the server's clock; None for never.
    """

    silent_seconds: Seconds = 0.0
    beat: Word | None = None
    last_seen: Moment | None = None


class SiteStatus(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The server's view of one site.

    Attributes:
        applied: sequenced messages that were applied.
        queued: messages at the broker that are not applied yet; None: the site has not reported it.
        batches, samples: training batches and samples that were applied.
        share: share of all training batches, 0 to 1.
        outliers: parts of its messages that were scaled down as outliers.
        excluded_at: number of applied messages of all sites at its exclusion; None: not excluded.
        loss, staleness: of its last training batch, where the server knows it.
        presence: its silence.
    """

    applied: Count = 0
    queued: Count | None = None
    batches: Count = 0
    samples: Count = 0
    share: Share = 0.0
    outliers: Count = 0
    excluded_at: Count | None = None
    loss: float | None = None
    staleness: Count | None = None
    presence: Presence = Presence()

    @property
    def excluded(self) -> bool:
        """True if the run goes on without it."""
        return self.excluded_at is not None

    @property
    def last_seen(self) -> datetime | None:
        """Time of the site's last sign of life at the server."""
        return self.presence.last_seen


class Round(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Open round of a run: its number, and the time of its opening."""

    number: Count = 0
    opened: Moment | None = None


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Status of a worker. A count is None where the worker does not have it (yet).

    Attributes:
        phase, detail: its state, and the reason.
        run, digest: id and digest of its run.
        skipped_checkpoints: name and damage of each checkpoint that was skipped.
        sent, confirmed: messages handed to the broker, and those it has confirmed.
        duplicates, refused: messages that came again, and those put into the dead letter queue.
        checkpoints: checkpoints written by this process.
        planned: messages of the plan; at the server of all sites, once all are known.
        answered, queued: of a site: messages with an answer; messages at the broker and not applied yet.
        beat: of a site: a new text each time, by which the server knows that the site lives.
        server: of a site: its view of the server.
        applied: sequenced messages of all sites; from here on all are the server's.
        steps, epoch: training steps; the last evaluated epoch.
        fence: number of the server's incarnation.
        loss, staleness: of the last training batch, where it has samples of several sites.
        lacking: sites silent for too long, without which the quorum is not met.
        round: the open round.
        sites: the server's view of each site.
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
    """Return the record of `status`: JSON."""
    return msgspec.json.encode(status).decode()


def read_status(record: bytes | str, worker: str) -> WorkerStatus:
    """Return the status in a record of `worker`; `UNREADABLE` if it breaks the schema or is too long."""
    if len(record) > record_bytes_max(worker):
        return UNREADABLE
    try:
        return _decoder.decode(record)
    except (msgspec.MsgspecError, ValueError, RecursionError):  # ValueError: invalid text
        return UNREADABLE


def record_bytes_max(worker: str) -> int:
    """Return the length of the longest record of `worker` that is read."""
    return SERVER_BYTES if worker == SERVER else SITE_BYTES


def clean_detail(text: str) -> str:
    """Make a text fit for `detail`: cut to its length, and valid UTF-8."""
    return text[:DETAIL_CHARS].encode(errors="replace").decode()
