"""Power cuts: what a component has confirmed is still there on a disk that forgets all that was not forced to it.

A process of its own works on the disk and tells what was confirmed. It is killed at some moment, and the power cut.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from contextlib import closing, suppress
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from nightsplit.broker.embedded.broker import EmbeddedBroker
from nightsplit.broker.topology import site_queues
from nightsplit.server_worker.metrics_log import MetricsLog
from nightsplit.server_worker.tape import Tape, read_tape
from nightsplit.shared.engine.effects import Record
from nightsplit.shared.run_store.redis import RedisStore
from nightsplit.shared.run_store.sqlite import SqliteStore
from nightsplit.shared.storage.checkpoint import Checkpoints, Pointer, Snapshot
from nightsplit.shared.storage.files import make_private_folder, make_secret_file, read_secret_file, write_atomic
from nightsplit.shared.transport import Confirmed, Delivery
from nightsplit.site_worker.privacy.accounting import Use
from nightsplit.site_worker.privacy.ledger import Ledger
from tests.harness.forgetful import ForgetfulDisk
from tests.harness.processes import FORKS
from tests.harness.services import RedisServer

pytestmark = pytest.mark.usefixtures("power_cuts")

QUEUE = site_queues("run", "north", 2**30).up
USE = Use(0.1, 1.0, 10**6)

Tell = Callable[[int], None]


def write_checkpoints(folder: Path, tell: Tell) -> None:
    kept = Checkpoints(folder)
    for number in itertools.count(1):
        kept.write(0, number, Snapshot({"weights": torch.full((64, 64), float(number))}, {"number": number}))
        kept.prune()
        tell(number)


def expect_checkpoints(folder: Path, told: list[int]) -> None:
    found = Checkpoints(folder).load()
    assert found is not None
    pointer, snapshot, damaged = found
    assert damaged == []
    assert pointer.counter >= told[-1]
    assert torch.equal(snapshot.tensors["weights"], torch.full((64, 64), float(pointer.counter)))


def body_of(number: int) -> bytes:
    """Small bodies are in a row, large ones in a file."""
    return number.to_bytes(4, "big") * (8 if number % 3 else 64 * 1024)


def publish(folder: Path, tell: Tell) -> None:
    broker = EmbeddedBroker(folder)
    broker.declare([QUEUE])
    published = itertools.count(1)
    with broker.link([], 1, "north") as link:
        while True:
            while len(link.unconfirmed) < 8:
                number = next(published)
                link.publish(QUEUE, str(number), [body_of(number)])
            if isinstance(event := link.receive(1.0), Confirmed):
                tell(int(event.message_id))


def expect_messages(folder: Path, told: list[int]) -> None:
    found: list[int] = []
    deadline = time.monotonic() + 30
    with EmbeddedBroker(folder).link([QUEUE], 512, "server") as link:
        while max(told) not in found:
            assert time.monotonic() < deadline, f"{max(told)} is lost, {found[-5:]} are there"
            if isinstance(event := link.receive(1.0), Delivery):
                assert bytes(event.body) == body_of(int(event.message_id))
                found.append(int(event.message_id))
    assert found == sorted(found)
    assert set(told) <= set(found)


def move_pointers(folder: Path, tell: Tell) -> None:
    store = SqliteStore(folder / "run.db", "run")
    fence = store.acquire_lease("server", 15.0)
    assert fence is not None
    for number in itertools.count(1):
        assert store.claim_position(number, f"site {number}") == f"site {number}"
        assert store.move_pointer(Pointer(fence, number, "0" * 64))
        tell(number)


def expect_pointer_and_journal(folder: Path, told: list[int]) -> None:
    with closing(SqliteStore(folder / "run.db", "run")) as store:
        pointer = store.pointer()
        assert pointer is not None
        assert pointer.counter >= told[-1]
        assert store.acquire_lease("server", 15.0) == pointer.fence + 1
        assert [store.journal_entry(number) for number in told] == [f"site {number}" for number in told]


def spend(folder: Path, tell: Tell) -> None:
    ledger = Ledger(folder / "ledger.db")
    ledger.begin("run", "data", USE, 1e-5, ["a", "b"], None)
    for steps in itertools.count(1):
        ledger.spend("run", steps, None)
        tell(steps)


def expect_payments(folder: Path, told: list[int]) -> None:
    with closing(Ledger(folder / "ledger.db")) as ledger:
        (entry,) = ledger.entries()
    assert entry.use.steps >= told[-1]


def replace_files(folder: Path, tell: Tell) -> None:
    for number in itertools.count(1):
        write_atomic(folder / "file", f"{number}".encode() * 3000)
        if number < 4:
            (folder / f"copy{number}").write_bytes(make_secret_file(folder / f"secret{number}"))
        tell(number)


def expect_files(folder: Path, told: list[int]) -> None:
    content = (folder / "file").read_text()
    number = int(content[: len(content) // 3000])
    assert content == f"{number}" * 3000
    assert number >= told[-1]
    for name in {f"secret{number}" for number in told if number < 4}:
        read_secret_file(folder / name)


def record(folder: Path, tell: Tell) -> None:
    """Tape and metrics, which a checkpoint forces to disk before it counts."""
    tape, log = Tape(folder / "tape"), MetricsLog(folder / "report", 0)
    for number in itertools.count(1):
        tape.write(Delivery("queue", str(number), bytes(1000)))
        log.write(Record({"event": "train", "step": number, "site": "north", "loss": 0.5}))
        if number % 5 == 0:
            tape.sync()
            log.sync()
            tell(number)


def expect_records(folder: Path, told: list[int]) -> None:
    on_tape = [int(delivery.message_id) for delivery in read_tape(folder / "tape", [])]
    assert on_tape[: told[-1]] == [*range(1, told[-1] + 1)]
    with closing(MetricsLog(folder / "report", told[-1])):
        assert len((folder / "report" / "metrics.jsonl").read_text().splitlines()) == told[-1]


COMPONENTS = [
    (write_checkpoints, expect_checkpoints),
    (publish, expect_messages),
    (move_pointers, expect_pointer_and_journal),
    (spend, expect_payments),
    (replace_files, expect_files),
    (record, expect_records),
]
NAMES = [work.__name__ for work, _ in COMPONENTS]


def work(component: Callable[[Path, Tell], None], folder: Path, line: Connection) -> None:
    component(folder, line.send)


def cut_while(
    component: Callable[[Path, Tell], None], disk: ForgetfulDisk, folder: Path, dice: random.Random
) -> list[int]:
    """Start it, kill it at some moment, cut the power; returns all that it told until then."""
    folder.mkdir()
    ours, theirs = FORKS.Pipe(duplex=False)
    worker = FORKS.Process(target=work, args=(component, folder, theirs))
    worker.start()
    theirs.close()
    told = [ours.recv() for _ in range(dice.randint(1, 20))]
    time.sleep(dice.uniform(0.0, 0.02))  # somewhere between two confirmations
    worker.kill()
    worker.join()
    with suppress(EOFError):
        while True:
            told.append(ours.recv())
    disk.cut()
    return told


@pytest.fixture
def disk(tmp_path):
    with closing(ForgetfulDisk(tmp_path / "disk")) as disk:
        yield disk


def test_a_disk_forgets_what_was_not_forced_to_it_and_nothing_else(disk):
    write_atomic(disk.folder / "kept", b"kept")
    (disk.folder / "forgotten").write_bytes(b"forgotten")
    (disk.folder / "kept").rename(disk.folder / "renamed")
    disk.cut()
    assert [path.name for path in disk.folder.iterdir()] == ["kept"]
    assert (disk.folder / "kept").read_bytes() == b"kept"


def test_folders_above_a_new_file_are_not_forgotten(disk):
    make_private_folder(disk.folder / "some" / "new" / "folder")
    disk.cut()
    assert (disk.folder / "some" / "new" / "folder").is_dir()


@pytest.mark.parametrize(
    ("appendfsync", "kept"), [("always", True), pytest.param("no", False, marks=pytest.mark.campaign)]
)
def test_redis_keeps_or_loses_the_pointer_as_doctor_says(appendfsync, kept, disk):
    pointer = Pointer(1, 7, "0" * 64)
    with RedisServer(disk.folder / "redis", appendfsync) as redis:
        with closing(RedisStore(redis.url, "run")) as store:
            assert store.acquire_lease("server", 15.0) == 1
            assert store.move_pointer(pointer)
            assert (store.loss_at_power_cut() is None) is kept
        redis.kill()
        disk.cut()
        redis.start()
        with closing(RedisStore(redis.url, "run")) as store:
            assert store.pointer() == (pointer if kept else None)


@pytest.mark.parametrize(("component", "expect"), COMPONENTS[:2], ids=NAMES[:2])
def test_what_was_confirmed_survives_a_power_cut(component, expect, disk):
    told = cut_while(component, disk, disk.folder / "0", random.Random(1))
    expect(disk.folder / "0", told)


@pytest.mark.campaign
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("component", "expect"), COMPONENTS, ids=NAMES)
def test_what_was_confirmed_survives_forty_power_cuts(component, expect, disk):
    dice = random.Random(2)
    for number in range(40):
        folder = disk.folder / str(number)
        expect(folder, cut_while(component, disk, folder, dice))
