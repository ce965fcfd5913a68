"""Two sites whose messages a server of the Stream shape answers.

With batches of twelve, south has two training batches, east has one; both have one of each held-out part:

    south   1 T   2 T   3 V   4 S
    east    1 T   2 V   3 S
"""

import torch

from nightsplit.shared.engine.effects import Finish, Record
from nightsplit.shared.errors import Refused
from nightsplit.shared.wire.message import Kind
from tests.harness.effects import from_site, hello, sent
from tests.harness.night import tiny_config
from tests.harness.pure_roles import pure_server

SITES = ("south", "east")
PROGRESS = {"best": 0, "judged": 0}
GRADIENT = {"gradient": (12, 8)}
ILLEGIBLE = Refused(306, "it was short.", "send it whole.")


def config_of(protocol, **run):
    settings = {"protocol": protocol, "window": 2, "epochs": 1, "batch_size": 12, "dropout": 0.0}
    return tiny_config(SITES, **{**settings, **run})


def opened(config):
    server = pure_server(config)
    server.start()
    for site in SITES:
        server.on(hello(config, site))
    return server


def samples(rows, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 8, generator=generator), torch.arange(rows, dtype=torch.float32) % 2


def smashed(site, seq, rows, version=0, labels=True, seed=1):
    values, targets = samples(rows, seed)
    tensors = {"smashed": values, "targets": targets} if labels else {"smashed": values}
    return from_site(site, Kind.SMASHED, seq, version, tensors)


def trained(step, site, loss, staleness=0):
    return Record({"event": "train", "step": step, "site": site, "epoch": 1, "loss": loss, "staleness": staleness})


def cut_gradient(site, seq, **verdict):
    return sent(site, Kind.CUT_GRADIENT, seq, reply_to=seq, shapes=GRADIENT, **{**PROGRESS, **verdict})


def noted(site, seq, **verdict):
    return sent(site, Kind.NOTED, seq, reply_to=seq, **{**PROGRESS, **verdict})


def refused(site, seq, **verdict):
    told = {"number": 306, "reason": "it was short."}
    return sent(site, Kind.REFUSED, seq, reply_to=seq, **{**told, **PROGRESS, **verdict})


def evaluations(effects):
    """Whose figures of what are recorded, and the other effects."""
    lines = [one.metrics for one in effects if isinstance(one, Record) and one.metrics["event"] == "evaluate"]
    others = [one for one in effects if not (isinstance(one, Record) and one.metrics["event"] == "evaluate")]
    return [(line["site"], line["part"]) for line in lines], others


ALL_SITES = [(site, part) for site in ("south", "east", "overall") for part in ("validation", "test")]


def ends(server, last, **verdict):
    """The farewell to sites whose last message had these numbers."""
    return Finish(tuple(
        sent(site, Kind.FINISH, seq + 1, reply_to=seq + 1, summary=server.summary, **verdict)
        for site, seq in last.items()
    ))  # fmt: skip
