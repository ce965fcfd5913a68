"""The server's side of split_u: through the middle and back, and figures that sites have measured."""

import pytest
import torch

from nightsplit.shared.learning.metrics import measure
from nightsplit.shared.protocols.build import build_split_model
from nightsplit.shared.protocols.report import NO_FIGURES, encode_report
from nightsplit.shared.wire.message import Kind
from tests.harness.effects import exact, from_site, refusal_of, restored, seen, sent
from tests.harness.pure_roles import NOWHERE, pure_server
from tests.roles.streams import (
    ALL_SITES,
    ILLEGIBLE,
    PROGRESS,
    SITES,
    config_of,
    cut_gradient,
    ends,
    evaluations,
    noted,
    opened,
    refused,
    samples,
    smashed,
    trained,
)


@pytest.fixture
def u_shaped():
    """With window 1: first and second half of item 1, of item 2, and so on."""
    return opened(config_of("split_u", window=1))


def first_half(site, seq, rows=12, version=0):
    return smashed(site, seq, rows, version, labels=False)


def head_input(site, seq, rows=12):
    return sent(site, Kind.HEAD_INPUT, seq, reply_to=seq, shapes={"activations": (rows, 8)}, **PROGRESS)


def head_gradient(site, seq, version=0):
    return from_site(site, Kind.HEAD_GRADIENT, seq, version, {"gradient": torch.ones(12, 8)})


def report(site, seq, version, metrics=NO_FIGURES):
    return from_site(site, Kind.REPORT, seq, version, metrics=metrics)


def test_split_u_computes_the_middle_and_goes_back_through_it(u_shaped):
    config = u_shaped.config
    middle, inputs = build_split_model(config, NOWHERE).parts.top, samples(12)[0].requires_grad_()
    outputs = middle(inputs)
    outputs.backward(torch.ones(12, 8))
    forward = u_shaped.on(first_half("south", 1))
    assert seen(forward) == [head_input("south", 1)]
    assert torch.allclose(forward[0].tensors["activations"], outputs.detach())
    backward = u_shaped.on(head_gradient("south", 2))
    assert seen(backward) == [cut_gradient("south", 2), trained(1, "south", None)]
    assert torch.allclose(backward[0].tensors["gradient"], inputs.grad)


def test_split_u_uses_the_weights_of_the_forward_though_others_learned_since(u_shaped):
    forward = {site: u_shaped.on(first_half(site, 1)) for site in SITES}
    assert exact(forward["south"])[0].tensors == exact(forward["east"])[0].tensors
    again = restored(u_shaped, pure_server(u_shaped.config))
    gradients = []
    for server in (u_shaped, again):
        gradients += [server.on(head_gradient(site, 2))[0].tensors["gradient"].tolist() for site in SITES]
    assert gradients[0] == gradients[1] == gradients[2] == gradients[3]


def test_split_u_refuses_a_gradient_without_a_forward(u_shaped):
    u_shaped.on(first_half("south", 1))
    u_shaped.refused(first_half("east", 1).header, ILLEGIBLE)
    refusal = refusal_of(u_shaped, head_gradient("east", 2))
    assert (refusal.number, refusal.sentence) == (304, "item 1 has no forward pass that waits for a gradient.")
    assert seen(u_shaped.on(report("east", 2, 0))) == [noted("east", 2)]
    assert seen(u_shaped.refused(head_gradient("south", 2).header, ILLEGIBLE)) == [refused("south", 2)]
    assert refusal_of(u_shaped, head_gradient("south", 2)).number == 304, "its forward is closed"


def test_split_u_judges_by_the_figures_of_the_sites(u_shaped):
    config = u_shaped.config
    figures = {
        part: measure(config.task, config.data, torch.zeros(rows, 1), torch.arange(rows) % 2.0)
        for part, rows in (("test", 4), ("validation", 3))
    }
    text = encode_report(config.task, figures)
    for site, batches, rows in (("south", 2, 6), ("east", 1, 4)):
        for item in range(1, batches + 1):
            u_shaped.on(first_half(site, 2 * item - 1, version=item - 1))
            u_shaped.on(head_gradient(site, 2 * item, version=item - 1))
        first = 2 * batches + 1
        assert seen(u_shaped.on(first_half(site, first, rows, batches))) == [head_input(site, first, rows)]
        lie = report(site, first + 1, batches, text)
        assert refusal_of(u_shaped, lie).sentence.endswith("has figures where none are due.")
        assert seen(u_shaped.on(report(site, first + 1, batches))) == [noted(site, first + 1)]
        u_shaped.on(first_half(site, first + 2, rows, batches))
        effects = u_shaped.on(report(site, first + 3, batches, text))
    recorded, others = evaluations(effects)
    assert recorded == [(site, part) for site in SITES for part in figures] + ALL_SITES[4:]
    assert all(
        effects[place].metrics.items() >= figures[part].items() for place, part in ((1, "test"), (2, "validation"))
    )
    assert others[0].kind is Kind.NOTED
    assert seen(others)[1] == ends(u_shaped, {"south": 8, "east": 6}, best=1, judged=1)
