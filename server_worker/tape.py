"""The tape: every message that the server of a run received, for `nightsplit replay`.

    <state>/tape/000001.tape   what the first server process received, in the order of arrival
                 000002.tape   what the next one received; and so on

    entry   mark | sizes | sha256 of names and body | names: queue, message id | body

    broker ──delivery──▶ written ──▶ engine ──acknowledgement──▶ forced to disk ──▶ broker

What the broker may forget is on the tape. What comes again, after a crash or as a duplicate, is
written again; a replay drops it by its number, as the server did. Every process writes a file of
its own: an entry that was cut short by a crash is the last of its file and was not acknowledged,
and a server that was replaced while it slept cannot damage what its successor writes.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from struct import Struct
from typing import BinaryIO

from nightsplit.broker.proxy import WrappedLink
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.errors import StateError
from nightsplit.shared.storage.files import force_to_disk, make_private_folder
from nightsplit.shared.transport import Delivery, Event, Link

FOLDER = "tape"
"""In the server's state folder."""

_MARK = b"NSTP"
_HEAD = Struct(">4sII32s")
"""Mark, bytes of names, bytes of body, sha256 of both."""


def taped(link: Link, config: RunConfig, state: Path) -> Link:
    """The server's link, which records where run.toml asks for it."""
    return TapedLink(link, Tape(state / FOLDER)) if config.run.tape else link


class Tape:
    """What one server process receives, as a file in the tape's folder that is made with its first entry."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: BinaryIO | None = None
        self._unsynced = 0

    def write(self, delivery: Delivery) -> None:
        """Append a delivery; `sync` makes it durable. StateError 501 where the disk is full."""
        names = json.dumps([delivery.queue, delivery.message_id]).encode()
        head = _HEAD.pack(_MARK, len(names), len(delivery.body), _sha256(names, delivery.body))
        self._unsynced += len(head) + len(names) + len(delivery.body)
        with self._disk_errors():
            if self._file is None:
                self._file = self._begin()
            for piece in (head, names, delivery.body):
                self._file.write(piece)

    def sync(self) -> None:
        """Force to disk what was written; StateError 501 where the disk is full."""
        if self._file is None or not self._unsynced:
            return
        with self._disk_errors():
            self._file.flush()
            os.fsync(self._file.fileno())
        self._unsynced = 0

    def close(self) -> None:
        """Let go of the file; raises as `sync`."""
        if self._file is not None:
            with self._disk_errors():
                self._file.close()

    def _begin(self) -> BinaryIO:
        """A file behind all others, that outlives a power cut."""
        make_private_folder(self._folder)
        number = max((int(file.stem) for file in _files(self._folder)), default=0) + 1
        while True:
            try:
                begun = (self._folder / f"{number:06d}.tape").open("xb")
            except FileExistsError:  # another server was faster
                number += 1
                continue
            for folder in (self._folder, self._folder.parent):
                force_to_disk(folder)
            return begun

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            needed = f"the next entries need {self._unsynced} bytes. What was acknowledged is on the tape."
            what = f"{self._folder} cannot be written ({error.strerror}); {needed}"
            remedy = "make room on that disk, then start the server again: it continues where it was."
            raise StateError(501, what, remedy) from None


class TapedLink(WrappedLink):
    """A link whose deliveries are on the tape before the broker may forget them.

    `receive`, `acknowledge` and `close`, which also closes the tape, raise StateError 501 when its disk is full.
    """

    def __init__(self, link: Link, tape: Tape) -> None:
        super().__init__(link)
        self._tape = tape

    def receive(self, timeout: float) -> Event | None:
        """See `Link`."""
        event = self._link.receive(timeout)
        if isinstance(event, Delivery):
            self._tape.write(event)
        return event

    def acknowledge(self, delivery: Delivery) -> None:
        """See `Link`; one fsync for all that a checkpoint sets free."""
        self._tape.sync()
        self._link.acknowledge(delivery)

    def close(self) -> None:
        """See `Link`."""
        try:
            super().close()
        finally:
            self._tape.close()


def recorded(folder: Path, damaged: list[str]) -> Iterator[Delivery]:
    """The deliveries of a tape, in the order of arrival.

    Args:
        folder: the tape's.
        damaged: takes a line for every place that cannot be read. The end of a file may be one: an
            entry that a crash cut short is no loss.

    Raises:
        StateError: 507 nothing was ever recorded here.
    """
    files = _files(folder)
    if not files:
        raise StateError(
            507,
            f"there is none in {folder}.",
            "a run is recorded when run.toml says tape = true from its beginning, where the server's state folder is.",
        )
    for path in files:
        with path.open("rb") as file:
            yield from _entries(file, path, damaged)


def _entries(file: BinaryIO, path: Path, damaged: list[str]) -> Iterator[Delivery]:
    end = os.fstat(file.fileno()).st_size
    while (place := file.tell()) < end:
        head = file.read(_HEAD.size)
        mark, names_size, body_size, sha256 = _HEAD.unpack(head.ljust(_HEAD.size))
        if len(head) < _HEAD.size or mark != _MARK or file.tell() + names_size + body_size > end:
            damaged.append(f"{path.name} from byte {place} on")
            return
        names, body = file.read(names_size), file.read(body_size)
        if _sha256(names, body) != sha256:
            damaged.append(f"{path.name} at byte {place}")
            continue
        queue, message_id = json.loads(names)
        yield Delivery(queue, message_id, body)


def _sha256(names: bytes, body: bytes) -> bytes:
    digest = hashlib.sha256(names)
    digest.update(body)
    return digest.digest()


def _files(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(folder.glob("*.tape"), key=lambda file: int(file.stem))
