"""What must be equal to the bit, whatever the broker, the hour, or the way the model is cut."""

import pytest
import torch

from nightsplit.broker.embedded.broker import EmbeddedBroker
from nightsplit.broker.rabbitmq.broker import RabbitBroker
from nightsplit.shared.learning.losses import loss_of
from nightsplit.shared.learning.optimizers import PartOptimizer, Progress
from nightsplit.shared.learning.seeds import seed_for, seeded
from nightsplit.shared.protocols.plan import Item, Purpose
from nightsplit.shared.wire.message import SERVER
from nightsplit.site_worker.stream.batches import StreamBatches
from nightsplit.site_worker.stream.bottom import Bottom
from tests.harness.night import Night, tiny_config, tiny_factory, tiny_splits

STEADY = Progress(0, 0, 3)


def whole_model(config):
    with seeded(seed_for(config.run.seed, "model")):
        return tiny_factory(**config.model.settings)


def ordinary_training(config, site):
    """The uncut model, one optimizer, plain autograd; dropout seeded per half and step as in a run."""
    model, batches = whole_model(config), StreamBatches(config, site, tiny_splits(site), config.run.seed)
    optimizer = PartOptimizer(config.optimizer, model.parameters())
    model.train()
    for q in range(1, batches.plan.last + 1):
        item = batches.plan.item(q)
        if item.purpose is not Purpose.TRAIN:
            continue
        with seeded(batches.seed("bottom", item)):
            smashed = model[: config.model.cut](batches.inputs(item))
        with seeded(batches.seed("top", item)):
            loss = loss_of(config.task, model[config.model.cut :](smashed), batches.targets(item))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(batches.plan.progress(item))
    return model.state_dict()


def trained_whole(night, site):
    """The weights of a finished run, put together as the uncut model numbers them."""
    cut, head_cut = night.config.model.cut, night.config.model.head_cut
    parts = [(0, night.roles[site].bottom.module), (cut, night.roles[SERVER].top.module)]
    if night.config.run.protocol == "split_u":
        parts.append((head_cut, night.roles[site].head.module))
    whole = {}
    for first, module in parts:
        for position, stage in enumerate(module.children()):
            whole.update({f"{first + position}.{name}": tensor for name, tensor in stage.state_dict().items()})
    return whole


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("protocol", ["split_labels", "split_u"])
def test_one_site_window_1_is_ordinary_training(protocol, optimizer, tmp_path):
    config = tiny_config(("north",), protocol=protocol, window=1, codec="fp32", optimizer=optimizer)
    night = Night(config, tmp_path).run()
    expected, found = ordinary_training(config, "north"), trained_whole(night, "north")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    assert not torch.equal(expected["0.weight"], whole_model(config).state_dict()["0.weight"])


def test_split_u_equals_split_labels(tmp_path):
    nights = []
    for protocol in ("split_labels", "split_u"):
        config = tiny_config(("south",), protocol=protocol, window=1, codec="fp32")
        nights.append(Night(config, tmp_path / protocol))
        nights[-1].run()
    labels, u = (trained_whole(night, "south") for night in nights)
    assert all(torch.equal(labels[name], u[name]) for name in labels)


@pytest.fixture(params=["embedded", "rabbitmq"])
def real_broker(request, tmp_path):
    if request.param == "embedded":
        return EmbeddedBroker(tmp_path / "broker")
    return RabbitBroker(request.getfixturevalue("rabbitmq").vhost())


@pytest.mark.parametrize("protocol", ["split_labels", "split_u", "split_frozen"])
def test_every_broker_gives_the_same_weights(protocol, real_broker, tmp_path):
    config = tiny_config(protocol=protocol, window=4, epochs=2)
    in_memory, elsewhere = Night(config, tmp_path / "a"), Night(config, tmp_path / "b", real_broker)
    in_memory.run()
    elsewhere.run()
    assert elsewhere.fingerprint() == in_memory.fingerprint()


@pytest.mark.parametrize("protocol", ["split_labels", "split_frozen"])
def test_a_decoupled_night_equals_a_night_together(protocol, tmp_path):
    """Sites publish a window of 64 and exit; the server works with no site up, and exits; and so on."""
    config = tiny_config(protocol=protocol, window=64, batch_size=4, epochs=8)
    apart, together = Night(config, tmp_path / "apart"), Night(config, tmp_path / "together")
    apart.work(SERVER)  # opens the run: the manifest lies in the queues
    for site in config.run.sites:
        assert not apart.work(site)
    for site in config.run.sites:
        role = apart.roles[site]
        assert role.answered == 0
        assert role.next_seq - 1 == min(role.sequence.last, 64 if protocol == "split_labels" else 10**6)
    finished = False
    while not finished:
        apart.work(SERVER)
        visits = [apart.work(site) for site in config.run.sites]
        finished = all(visits)
    together.run()
    assert apart.fingerprint() == together.fingerprint()


def training_item(q, version):
    return Item(q, Purpose.TRAIN, 1, q - 1, 3, range(8), version)


def test_gradients_of_two_batches_in_flight_match_a_reference():
    """Forwards of q and q + 1 by the same version, answered first in, first out."""
    config = tiny_config(window=2)
    module = whole_model(config)[:3]
    bottom, inputs = Bottom(module, config.optimizer, "cpu"), torch.randn(2, 8, 6)
    gradients = torch.randn(2, 8, 8)
    first = {name: tensor.detach().clone() for name, tensor in module.named_parameters()}
    for q in (1, 2):
        bottom.forward(training_item(q, 0), inputs[q - 1], seed=q, training=True)
    for q in (1, 2):
        bottom.apply_gradient(training_item(q, 0), inputs[q - 1], seed=q, gradient=gradients[q - 1], progress=STEADY)
        reference = whole_model(config)[:3]
        reference.load_state_dict(first)
        with seeded(q):
            (reference(inputs[q - 1]) * gradients[q - 1]).sum().backward()
        for ours, theirs in zip(module.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)


def test_recomputing_equals_the_kept_graph():
    config = tiny_config(window=2)
    results = []
    for forget_graphs in (False, True):
        bottom = Bottom(whole_model(config)[:3], config.optimizer, "cpu")
        torch.manual_seed(0)
        for q in (1, 2, 3):
            inputs, item = torch.randn(8, 6), training_item(q, max(0, q - 2))
            bottom.forward(item, inputs, seed=q, training=True)
            if forget_graphs:
                bottom._graphs.clear()
            bottom.apply_gradient(item, inputs, seed=q, gradient=torch.randn(8, 8), progress=STEADY)
        results.append(bottom.module.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_batch_norm_counts_every_batch_once():
    """Two forwards per batch (sent, recomputed) must update running statistics once, as plain training does."""
    module = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4))
    plain = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4))
    plain.load_state_dict(module.state_dict())
    bottom = Bottom(module, tiny_config().optimizer, "cpu")
    optimizer = PartOptimizer(tiny_config().optimizer, plain.parameters())
    for q in (1, 2, 3):
        inputs, gradient = torch.randn(8, 6), torch.randn(8, 4)
        bottom.forward(training_item(q, q - 1), inputs, seed=0, training=True)
        bottom.apply_gradient(training_item(q, q - 1), inputs, seed=0, gradient=gradient, progress=STEADY)
        optimizer.zero_grad()
        plain(inputs).backward(gradient)
        optimizer.step(STEADY)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor), name
