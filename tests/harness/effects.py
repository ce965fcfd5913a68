"""Roles fed by hand: a message goes in, a list of effects comes out, and both are plain values that a test can spell.

assert seen(site.on(told(Kind.AVERAGE, 4, reply_to=4, ...))) == []
assert seen(site.next()) == [sent(SERVER, Kind.SMASHED, 5, version=4, shapes={"smashed": (4, 8), "targets": (4,)})]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from nightsplit.server_worker.protocols import make_server
from nightsplit.server_worker.role import ServerRole
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.engine.effects import Effect, Finish, Record, Send, Spend
from nightsplit.shared.engine.role import Role
from nightsplit.shared.errors import Refused
from nightsplit.shared.storage.checkpoint import Snapshot
from nightsplit.shared.wire.message import SERVER, Header, Kind, Message, Scalar
from nightsplit.site_worker.protocols import make_site
from nightsplit.site_worker.role import SiteRole
from tests.harness.dialogue import assert_unchanged, copied
from tests.harness.night import tiny_parts

RUN = "night"


@dataclass(frozen=True)
class Sent:
    """A `Send` as a test spells it; of a tensor its shape, or all its values."""

    receiver: str
    kind: Kind
    seq: int
    reply_to: int
    version: int
    tensors: Mapping[str, Any]
    scalars: Mapping[str, Scalar]


@dataclass(frozen=True)
class Finished:
    """A `Finish` with its last words."""

    farewell: list[Sent]


def sent(
    receiver: str, kind: Kind, seq: int, reply_to: int = 0, version: int = 0,
    shapes: Mapping[str, tuple[int, ...]] = {}, **scalars: Scalar,
) -> Sent:  # fmt: skip
    """What `seen` makes of such a `Send`."""
    return Sent(receiver, kind, seq, reply_to, version, shapes, scalars)


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def seen(effects: list[Effect], look: Callable[[torch.Tensor], Any] = _shape) -> list[Sent | Finished | Record | Spend]:
    """Effects as plain values, in their order."""

    def spelled(send: Send) -> Sent:
        tensors = {name: look(tensor) for name, tensor in send.tensors.items()}
        return Sent(
            send.receiver, send.kind, send.seq, send.reply_to, send.version, tensors, dict(send.scalars)
        )  # fmt: skip

    plain: list[Sent | Finished | Record | Spend] = []
    for effect in effects:
        match effect:
            case Send():
                plain.append(spelled(effect))
            case Finish(farewell):
                plain.append(Finished([spelled(send) for send in farewell]))
            case Record() | Spend():
                plain.append(effect)
    return plain


exact = partial(seen, look=torch.Tensor.tolist)
"""Effects with every value of every tensor."""


def site_of(config: RunConfig, name: str, folder: Path, incarnation: int = 1) -> SiteRole:
    """A site's role as a new process makes it; `folder` is for its ledger, in a private run."""
    return make_site(name, config, tiny_parts(name), f"{name}-{incarnation}", folder, ledger=folder / f"{name}.db")


def server_of(config: RunConfig, folder: Path) -> ServerRole[Any]:
    """The server's role as a new process makes it; `folder` is for released activations, in split_frozen."""
    return make_server(config, folder / SERVER, folder)


def told(
    kind: Kind, seq: int, reply_to: int = 0, version: int = 0,
    tensors: Mapping[str, torch.Tensor] = {}, site: str = "east", **scalars: Scalar,
) -> Message:  # fmt: skip
    """A message of the server to a site."""
    return Message(Header(RUN, SERVER, site, kind, seq, reply_to, version), tensors, scalars)


def said(
    site: str, kind: Kind, seq: int, version: int = 0, tensors: Mapping[str, torch.Tensor] = {}, **scalars: Scalar
) -> Message:
    """A message of a site to the server."""
    return Message(Header(RUN, site, SERVER, kind, seq, 0, version), tensors, scalars)


def manifest(config: RunConfig, site: str = "east") -> Message:
    """The run as the server opens it."""
    return told(Kind.MANIFEST, 0, site=site, config=config.canonical(), contract=config.contract)


def greeting(config: RunConfig, site: str, **changed: Scalar) -> dict[str, Scalar]:
    """What a site's hello says, once it is enrolled."""
    parts = tiny_parts(site)
    return {
        "incarnation": f"{site}-1", "contract": config.contract, "enrolled": True, "train": len(parts.train),
        "validation": len(parts.validation), "test": len(parts.test), "mark": 0, "released": 0, **changed,
    }  # fmt: skip


def hello(config: RunConfig, site: str, **changed: Scalar) -> Message:
    """A site's hello."""
    return said(site, Kind.HELLO, 0, **greeting(config, site, **changed))


def refusal_of(role: Role, message: Message) -> Refused:
    """The refusal of a message, which has left the role as it was."""
    before = copied(role.snapshot(None))
    with pytest.raises(Refused) as refusal:
        role.on(message)
    assert_unchanged(before, role.snapshot(None), message.header)
    return refusal.value


def restored(role: Role, fresh: Role, first_unconfirmed: int | None = None) -> Role:
    """A fresh role that goes on where another stands."""
    fresh.restore(copied(role.snapshot(first_unconfirmed)))
    return fresh
