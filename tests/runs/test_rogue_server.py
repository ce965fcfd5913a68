"""A rogue server with the genuine key, against a real `nightsplit site` (docs/explanation/attacks.md, B1 to B3)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from torch import nn

from nightsplit.broker.connect import open_broker
from nightsplit.broker.sealed import sealed
from nightsplit.broker.topology import site_queues
from nightsplit.server_worker.worker import ServerWorker
from nightsplit.shared.protocols.build import build_split_model
from nightsplit.shared.transport import Delivery, Link, Route
from nightsplit.shared.wire.format import encode, read_body
from nightsplit.shared.wire.head import read_head
from nightsplit.shared.wire.message import SERVER, Header, Kind, Message
from nightsplit.shared.wire.schema import Contract
from nightsplit.site_worker.worker import SiteWorker
from tests.harness.services import RabbitNode, wait_until
from tests.harness.workers import Hospital

BATCHES = 40
"""More than two epochs."""


@pytest.fixture(params=["embedded", pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)])
def hospital(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Hospital]:
    broker = "embedded:broker"
    if request.param == "rabbitmq":
        node: RabbitNode = request.getfixturevalue("rabbitmq")
        broker = node.vhost()
    hospital = Hospital(tmp_path / "run", broker=broker, epochs=4, sites=["north"])
    yield hospital
    hospital.close()


def identity(bottom: nn.Module) -> dict[str, torch.Tensor]:
    """Weights of a first layer from whose outputs every input can be read: x and -x in front of ReLU."""
    state = {name: torch.zeros_like(values) for name, values in bottom.state_dict().items()}
    [weight] = [name for name, values in state.items() if values.ndim == 2]
    inputs = state[weight].shape[1]
    state[weight][:inputs], state[weight][inputs : 2 * inputs] = torch.eye(inputs), -torch.eye(inputs)
    return state


def activations(link: Link, contract: Contract) -> Iterator[Message]:
    """The batches that arrive."""
    while (event := link.receive(20)) is not None:
        if isinstance(event, Delivery) and event.refusal is None:
            head = read_head(event.body, lambda header: contract.get(header.kind))
            if head.header.kind is Kind.SMASHED:
                yield read_body(head, event.body, 2**24)


def patients_read(patients: torch.Tensor, smashed: Iterable[torch.Tensor]) -> int:
    """Number of patients (rows of features) that follow from activations of the identity."""
    inputs = patients.shape[1]
    rows = [row[:inputs] - row[inputs : 2 * inputs] for batch in smashed for row in batch]
    return sum(any((row - patient).abs().max() < 0.05 for row in rows) for patient in patients)


def test_weights_that_were_not_asked_for_reveal_no_patient(hospital: Hospital) -> None:
    server, site = ServerWorker(hospital.folder / "server.toml"), SiteWorker(hospital.folder / "north.toml")
    config, folder = server.run_config, server.run_folder
    model = build_split_model(config, folder)
    averaged = build_split_model(replace(config, run=replace(config.run, bottoms="averaged")), folder)
    smashed: list[torch.Tensor] = []
    weights, patients = identity(model.parts.bottom), site.load_splits().train.inputs
    server.open_run()
    queues = site_queues(config.run.id, "north", config.wire.queue_bytes)
    routes = {"north": Route(outgoing=queues.down, incoming=queues.up, dead=queues.dead)}
    broker = open_broker(server.config.broker, server.base, config.wire.message_bytes, server.credentials)
    with sealed(broker.link([queues.up], 512, "rogue"), server.sealer, SERVER, routes) as link:
        hospital.start("north")
        for message in islice(activations(link, model.contract), BATCHES):
            smashed.append(message.tensors["smashed"])
            seq = message.header.seq
            header = Header(config.run.id, SERVER, "north", Kind.AVERAGE, seq, reply_to=seq)
            average = Message(header, weights, {"best": 0, "judged": 0})
            link.publish(queues.down, header.message_id, encode(average, averaged.contract[Kind.AVERAGE], 2**24))
        wait_until(lambda: broker.depth(queues.dead) == BATCHES, 20, "the site's refusal of each")
    assert patients_read(patients, smashed) == 0
    # Where the weights are obeyed, each patient is read.
    model.parts.bottom.load_state_dict(weights)
    assert patients_read(patients, [model.parts.bottom(patients).detach()]) == len(patients)
