"""Tape of every message that the server of a run received, for `nightsplit replay`.

    <state>/tape/000001.tape   messages to the first server process, in the order of arrival
                 000002.tape   messages to the next one; and so on

    entry   mark | sizes | sha256 of names and body | names: queue, message id | body

    broker ──delivery──▶ written ──▶ engine ──acknowledgement──▶ forced to disk ──▶ broker

Every acknowledged message is on the tape. A message that comes again, after a crash or as a duplicate,
is written again; a replay drops it by its number, as the server did. Every process writes a file of
its own: an entry that was cut short by a crash is the last of its file and was not acknowledged,
and a server that was replaced while it slept cannot damage its successor's file.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from struct import Struct
from typing import BinaryIO

from typing_extensions import override

from nightsplit.broker.link_wrapper import LinkWrapper
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.errors import StateError
from nightsplit.shared.storage.files import force_to_disk, make_private_folder
from nightsplit.shared.transport import Delivery, Event, Link

FOLDER = "tape"
"""Name of the tape's folder in the server's state folder."""

_MARK = b"NSTP"
_HEAD = Struct(">4sII32s")
"""Mark, bytes of names, bytes of body, sha256 of both."""


def tape_link(link: Link, config: RunConfig, state: Path) -> Link:
    """Return the server's link, with a tape where run.toml asks for one."""
    return TapedLink(link, Tape(state / FOLDER)) if config.run.tape else link


class Tape:
    """Tape of one server process, a file in the tape's folder that is created with its first entry."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: BinaryIO | None = None
        self._unsynced = 0

    def write(self, delivery: Delivery) -> None:
        """Append a delivery, which `sync` makes durable; StateError 501 when the disk is full."""
        names = json.dumps([delivery.queue, delivery.message_id]).encode()
        head = _HEAD.pack(_MARK, len(names), len(delivery.body), _sha256(names, delivery.body))
        self._unsynced += len(head) + len(names) + len(delivery.body)
        with self._disk_errors():
            if self._file is None:
                self._file = self._create()
            for piece in (head, names, delivery.body):
                self._file.write(piece)

    def sync(self) -> None:
        """Force the written entries to disk; StateError 501 when the disk is full."""
        if self._file is None or not self._unsynced:
            return
        with self._disk_errors():
            self._file.flush()
            os.fsync(self._file.fileno())
        self._unsynced = 0

    def close(self) -> None:
        """Close the file; raises as `sync`."""
        if self._file is not None:
            with self._disk_errors():
                self._file.close()

    def _create(self) -> BinaryIO:
        """Create the next file, durable in its folder."""
        make_private_folder(self._folder)
        number = max((int(file.stem) for file in _files(self._folder)), default=0) + 1
        while True:
            try:
                file = (self._folder / f"{number:06d}.tape").open("xb")
            except FileExistsError:  # another server was faster
                number += 1
                continue
            for folder in (self._folder, self._folder.parent):
                force_to_disk(folder)
            return file

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            size = f"the next entries need {self._unsynced} bytes. All acknowledged messages are on the tape."
            sentence = f"{self._folder} cannot be written ({error.strerror}); {size}"
            fix = "make room on that disk, then start the server again: it continues where it was."
            raise StateError(501, sentence, fix) from None


class TapedLink(LinkWrapper):
    """Link that writes deliveries to the tape before they are acknowledged.

    `receive`, `acknowledge` and `close`, which also closes the tape, raise StateError 501 when its disk is full.
    """

    def __init__(self, link: Link, tape: Tape) -> None:
        super().__init__(link)
        self._tape = tape

    @override
    def receive(self, timeout: float) -> Event | None:
        event = self._link.receive(timeout)
        if isinstance(event, Delivery):
            self._tape.write(event)
        return event

    @override
    def acknowledge(self, delivery: Delivery) -> None:
        self._tape.sync()  # one fsync for all deliveries that a checkpoint acknowledges
        self._link.acknowledge(delivery)

    @override
    def close(self) -> None:
        try:
            super().close()
        finally:
            self._tape.close()


def read_tape(folder: Path, damaged: list[str]) -> Iterator[Delivery]:
    """Yield the deliveries of a tape, in the order of arrival; StateError 507 if there is none in the folder.

    A line is added to `damaged` for every entry that cannot be read. The last one of a file may be one: an entry that
    a crash cut short is no loss.
    """
    files = _files(folder)
    if not files:
        fix = "write tape = true into run.toml before the run begins; the tape is in the server's state folder."
        raise StateError(507, f"there is none in {folder}.", fix)
    for path in files:
        with path.open("rb") as file:
            yield from _entries(file, path, damaged)


def _entries(file: BinaryIO, path: Path, damaged: list[str]) -> Iterator[Delivery]:
    end = os.fstat(file.fileno()).st_size
    while (offset := file.tell()) < end:
        head = file.read(_HEAD.size)
        mark, names_size, body_size, sha256 = _HEAD.unpack(head.ljust(_HEAD.size))
        if len(head) < _HEAD.size or mark != _MARK or file.tell() + names_size + body_size > end:
            damaged.append(f"{path.name} from byte {offset} on")
            return
        names, body = file.read(names_size), file.read(body_size)
        if _sha256(names, body) != sha256:
            damaged.append(f"{path.name} at byte {offset}")
            continue
        queue, message_id = json.loads(names)
        yield Delivery(queue, message_id, body)


def _sha256(names: bytes, body: bytes) -> bytes:
    digest = hashlib.sha256(names)
    digest.update(body)
    return digest.digest()


def _files(folder: Path) -> list[Path]:
    """Return the files of a tape, oldest first."""
    return sorted(folder.glob("*.tape"), key=lambda file: int(file.stem))
