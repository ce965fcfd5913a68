"""Exit log: one line for each message that leaves the hospital, in a chain of hashes.

    {"line": 17, "time": "...", "kind": "smashed", "seq": 9, "rows": 16, "bytes": 4711, "reveals": ["activations"],
     "sha256": "<of the message>", "policy": "<of policy.toml>", "approval": "<of its entry>", "head": "<of the chain>"}

    head   SHA-256 of (head of the line before | line without its head), in hexadecimal; the first follows on the digest

A line is written before its message is handed over, so that no message of a killed worker is without one; it is forced
to disk before the checkpoint that counts the message. A line that a power cut takes away is written again, since the
worker goes on from its checkpoint and sends the message again. Lines "witnessed" hold the server's co-signatures.
docs/reference/exit_log.md has a program that verifies a log without nightsplit.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from nightsplit.shared.errors import StateError
from nightsplit.shared.storage.files import force_to_disk, make_private_folder
from nightsplit.shared.trust.identity import PublicKey
from nightsplit.shared.trust.witness import is_cosigned
from nightsplit.shared.wire.message import Header, Kind, Scalar
from nightsplit.shared.wire.schema import Payload

FILE = "exit_log.jsonl"
"""Name of the log in the site's state folder."""

WITNESSED = "witnessed"
_TAIL_BYTES = 2**16
"""More than the longest line."""


class _Message(Struct, forbid_unknown_fields=True):
    """Line of a message."""

    line: int
    time: str
    kind: str
    seq: int
    rows: int | None
    bytes: int
    reveals: list[str]
    sha256: str
    policy: str
    approval: str
    head: str


class _Witnessed(Struct, forbid_unknown_fields=True):
    """Line of a co-signature."""

    line: int
    time: str
    kind: str
    lines: int
    head_signed: str
    signature: str
    head: str


class ExitLog:
    """Log of one site in one run, to which one process at a time appends.

    Args:
        path: its file, created with the first line.
        digest: digest of the run that the hospital approved, the beginning of the chain.
        policy: file of the hospital's policy.
        approval: hash of the run's approval; empty where a person acts, who sends a dead letter again.
    """

    def __init__(self, path: Path, digest: str, policy: Path, approval: str = "") -> None:
        self._path, self._policy, self._approval = path, policy, approval
        self._file: FileIO | None = None
        self.lines, self.head = 0, digest

    def open(self) -> None:
        """Open the file and find its end; StateError 503 if another process appends to it, 501 disk full, 515."""
        if self._file is not None:
            return
        try:
            make_private_folder(self._path.parent)
            is_new = not self._path.exists()
            file = self._path.open("a+b", buffering=0)
            self._path.chmod(0o600)
            if is_new:
                force_to_disk(self._path.parent)
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            self._lock(file)
            self._continue(file)
        except OSError as error:
            file.close()
            raise self._unwritable(error) from None
        except StateError:
            file.close()
            raise
        self._file = file

    def write(self, header: Header, payload: Payload, samples: int | None, body: Sequence[bytes | memoryview]) -> None:
        """Append the line of a message that is about to leave; errors as `open`."""
        digest = hashlib.sha256()
        for piece in body:
            digest.update(piece)
        policy = b""
        with suppress(OSError):
            policy = self._policy.read_bytes()
        self._append({
            "kind": str(header.kind), "seq": header.seq, "rows": samples,
            "bytes": sum(memoryview(piece).nbytes for piece in body), "reveals": sorted(map(str, payload.reveals)),
            "sha256": digest.hexdigest(), "policy": hashlib.sha256(policy).hexdigest(),
            "approval": self._approval,
        })  # fmt: skip

    def witness(self, signed: Mapping[str, Scalar]) -> None:
        """Append a co-signature of the server: `lines`, `head` and `signature`."""
        self._append({"kind": WITNESSED, **signed})

    def sync(self) -> None:
        """Force all lines to disk; StateError 501."""
        if self._file is not None:
            try:
                os.fsync(self._file.fileno())
            except OSError as error:
                raise self._unwritable(error) from None

    def synced_head(self) -> tuple[int, str]:
        """Return the number of lines and the head, which a power cut no longer takes back; errors as `open`."""
        self.open()
        self.sync()
        return self.lines, self.head

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _append(self, facts: Mapping[str, object]) -> None:
        self.open()
        assert self._file is not None
        line = {"line": self.lines + 1, "time": datetime.now(UTC).isoformat(timespec="milliseconds"), **facts}
        head = next_head(self.head, line)
        try:
            text = memoryview(_encode({**line, "head": head}) + b"\n")
            while text:  # without a buffer, so that closing the file after a full disk has nothing left to write
                text = text[self._file.write(text) :]
        except OSError as error:
            raise self._unwritable(error) from None
        self.lines, self.head = self.lines + 1, head

    def _lock(self, file: FileIO) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            remedy = "stop that worker first, or wait for its end."
            raise StateError(503, f"another process of this site writes {self._path}.", remedy) from None

    def _continue(self, file: FileIO) -> None:
        """Find the last whole line, and remove a part of a line that a crash left behind: its message did not leave."""
        end = file.seek(0, os.SEEK_END)
        start = max(0, end - _TAIL_BYTES)
        file.seek(start)
        tail = file.read()
        whole = tail[: tail.rfind(b"\n") + 1]
        if whole:
            last = _decode(whole.splitlines(keepends=True)[-1])
            if last is None:
                raise broken(self._path, "the last line is no line of a log")
            self.lines, self.head = last["line"], last["head"]
        elif start:
            raise broken(self._path, "its end is no line of a log")
        file.truncate(start + len(whole))

    def _unwritable(self, error: OSError) -> StateError:
        sentence = f"{self._path} cannot be written ({error.strerror}), and nothing leaves without a line in it."
        return StateError(501, sentence, "make room on that disk, then start again: the worker continues where it was.")


def next_head(head: str, line: Mapping[str, object]) -> str:
    """Return the head of the chain after a line, which lacks its head."""
    return hashlib.sha256(head.encode() + _encode(line)).hexdigest()


@dataclass(frozen=True)
class Verified:
    """Result of `verify`.

    Attributes:
        lines: number of lines of the log.
        head: head of its chain.
        witnessed: number of lines that the server's last co-signature covers.
        unsigned: number of messages with their first line behind these lines, apart from hellos. One that is sent again
            after a crash has another line, and tells nothing new.
    """

    lines: int
    head: str
    witnessed: int
    unsigned: int


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a log; StateError 515 one is no line of a log."""
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
            line = _decode(text)
            if line is None:
                raise broken(path, f"line {number} is no whole line of a log")
            yield line


def verify(path: Path, digest: str, site: str, server: PublicKey | None) -> Verified:
    """Verify the chain of a log and its co-signatures.

    Args:
        digest: digest of the run.
        site: name of the site.
        server: public key of the run's server; None in a run without keys.

    Raises:
        StateError: 515 with the first line that was changed, added or taken out.
    """
    heads, witnessed = [digest], 0
    first: dict[tuple[str, int, str], int] = {}
    for number, line in enumerate(read_log(path), 1):
        head = line.pop("head", None)
        if line.get("line") != number:
            raise broken(path, f"line {number} has the number {line.get('line')}: lines were added or taken out")
        if head != next_head(heads[-1], line):
            raise broken(path, f"line {number} does not fit the line before: it was changed, or lines were exchanged")
        heads.append(head)
        if line["kind"] not in (WITNESSED, Kind.HELLO):
            first.setdefault((line["kind"], line["seq"], line["sha256"]), number)
        if line["kind"] == WITNESSED:
            lines, signed = line["lines"], line["head_signed"]
            signature = line["signature"]
            if server is None or not is_cosigned(server, signature, digest, site, lines, signed):
                raise broken(path, f"line {number} is not signed by the server")
            if not 0 < lines < number or heads[lines] != signed:
                raise broken(path, f"line {number} is a signature of another log of {lines} lines")
            witnessed = lines
    return Verified(len(heads) - 1, heads[-1], witnessed, sum(number > witnessed for number in first.values()))


def broken(path: Path, what: str) -> StateError:
    """Return the error for a log that was changed."""
    remedy = "keep the file as it is; find out who changed it, and compare it with a backup."
    return StateError(515, f"{path}: {what}.", remedy)


def _decode(text: bytes) -> dict[str, Any] | None:
    """Return a line by key; None if no worker wrote it so."""
    try:
        line: dict[str, Any] = json.loads(text)
        msgspec.convert(line, _Witnessed if line["kind"] == WITNESSED else _Message)
    except (ValueError, KeyError, TypeError, RecursionError, msgspec.ValidationError):
        return None
    return line if _encode(line) + b"\n" == text else None


def _encode(line: Mapping[str, object]) -> bytes:
    return json.dumps(line, separators=(",", ":")).encode()
