"""Disks of RabbitMQ and Redis, searched for what they may not read: activations, labels, gradients, sample counts.

docs/explanation/trust.md; the embedded broker's disk is searched by tests/runs/test_envelopes.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Literal

import pytest
import redis
import torch

from nightsplit.broker.rabbitmq.broker import RabbitBroker
from nightsplit.broker.topology import SiteQueues, site_queues
from nightsplit.server_worker.worker import ServerWorker
from nightsplit.shared.protocols.build import build_split_model
from nightsplit.shared.transport import Delivery, Queue
from nightsplit.shared.wire.format import decode
from nightsplit.shared.wire.message import Kind, Message
from nightsplit.site_worker.worker import SiteWorker
from tests.harness.patterns import hits, scalars_in, seeded_patterns, tensors_in
from tests.harness.services import RabbitNode, RedisServer, declared_as
from tests.harness.workers import SHARES, Hospital

pytestmark = [pytest.mark.rabbitmq, pytest.mark.redis, pytest.mark.timeout(300)]

IDLE_S = 0.5
PIECES = 200


class Disks:
    """A run's broker and store, each with a folder of its own."""

    def __init__(self, folder: Path, keys: bool) -> None:
        self.node, self.redis = RabbitNode(folder / "rabbitmq"), RedisServer(folder / "redis")
        self.node.start()
        self.redis.start()
        self.url = self.node.vhost()
        self.hospital = Hospital(folder / "run", self.url, self.redis.url, epochs=2, keys=keys)
        self.server = ServerWorker(self.hospital.folder / "server.toml")

    def night(self) -> None:
        """All sites work, and no server."""
        self.server.open_run()
        for site in SHARES:
            SiteWorker(self.hospital.folder / f"{site}.toml").work(IDLE_S)

    def day(self) -> None:
        """The server works, and no site."""
        ServerWorker(self.hospital.folder / "server.toml").work(IDLE_S)

    def queues(self) -> list[SiteQueues]:
        return [site_queues("lipids", site, self.server.run_config.wire.queue_bytes) for site in SHARES]

    def bodies(self, *queues: Queue) -> Iterator[bytes]:
        """What waits in these queues, which stays there."""
        for queue in queues:
            with RabbitBroker(self.url).link([queue], 512, "reader") as link:
                while isinstance(event := link.receive(IDLE_S), Delivery):
                    yield event.body

    @contextmanager
    def at_rest(self) -> Iterator[tuple[Path, Path]]:
        """Folders of RabbitMQ and Redis after an orderly end, which writes all they hold; both go on afterwards."""
        with closing(redis.Redis.from_url(self.redis.url)) as client:
            client.config_set("rdbcompression", "no")
            client.save()
        self.node.stop()
        self.redis.stop()
        yield self.node.folder / "data", self.redis.folder
        self.node.start()
        self.redis.start()

    def messages(self, kind: Kind, bodies: Iterable[bytes]) -> list[Message]:
        """Those of a kind among unsealed bodies."""
        schema = build_split_model(self.server.run_config, self.server.run_folder).contract[kind]
        return [decode(body, schema, 2**24) for body in bodies if kind.encode() in body[:200]]

    def close(self) -> None:
        self.node.kill()
        self.redis.kill()


@pytest.fixture(params=["classic", "quorum"])
def disks(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Disks, Disks]]:
    """The same run without and with keys."""
    queue_type: Literal["classic", "quorum"] = request.param
    with declared_as(queue_type):
        plain, keyed = Disks(tmp_path / "plain", keys=False), Disks(tmp_path / "keyed", keys=True)
        yield plain, keyed
        plain.close()
        keyed.close()


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()


def pieces(tensors: Iterable[bytes]) -> list[bytes]:
    return seeded_patterns([tensor for tensor in tensors if len(tensor) > 24], PIECES)


def test_rabbitmq_and_redis_read_nothing_of_a_patient(disks: tuple[Disks, Disks]) -> None:
    """By night batches wait for the server, by day answers for the sites; without keys their pieces are found."""
    plain, keyed = disks
    plain.night()
    keyed.night()
    sent = list(plain.bodies(*(queues.up for queues in plain.queues())))
    counts = scalars_in([body for body in sent if b"enrolled\xc3" in body], b"train", b"validation", b"test")
    assert len(counts) >= 9
    batches = plain.messages(Kind.SMASHED, sent)
    by_night = counts + pieces(tensors_in(body) for body in sent if b"smashed" in body[:200])
    by_night += pieces(as_bytes(message.tensors["targets"]) for message in batches)
    with plain.at_rest() as (data, _):
        assert hits(by_night, data) == len(by_night)
    with keyed.at_rest() as (data, store):
        assert hits(by_night, data) == hits(by_night, store) == 0

    plain.day()
    keyed.day()
    received = [
        body for queues in plain.queues() for body in plain.bodies(queues.down) if b"cut_gradient" in body[:200]
    ]
    by_day = pieces(tensors_in(body) for body in received)
    tensors = [t for message in batches + plain.messages(Kind.CUT_GRADIENT, received) for t in message.tensors.values()]
    anything = by_night + by_day
    anything += pieces(as_bytes(t.half()) for t in tensors) + pieces(as_bytes(t.float()) for t in tensors)
    with closing(redis.Redis.from_url(plain.redis.url)) as client:
        client.set("control", b"".join(by_day))
    with plain.at_rest() as (data, store):
        assert hits(by_day, data) == hits(by_day, store) == PIECES
        assert {file.suffix for file in store.rglob("*.*") if by_day[0] in file.read_bytes()} == {".rdb", ".aof"}
    with keyed.at_rest() as (data, store):
        assert hits(anything, data) == hits(anything, store) == 0
