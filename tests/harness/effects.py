"""Roles fed by hand: a message goes in, a list of effects comes out, and both are plain values that a test can spell.

assert site.on(from_server(Kind.AVERAGE, 4, reply_to=4, ...)) == []
assert seen(site.next()) == [sent(SERVER, Kind.SMASHED, 5, version=4, shapes={"smashed": (4, 8), "targets": (4,)})]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.engine.effects import Effect, Finish, Send
from nightsplit.shared.engine.role import Role
from nightsplit.shared.errors import Refused
from nightsplit.shared.wire.message import SERVER, Header, Kind, Message, Scalar
from tests.harness.dialogue import assert_unchanged, copied
from tests.harness.night import tiny_splits

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Sent:
    """A `Send`; in place of each tensor stands its shape, or all its values."""

    receiver: str
    kind: Kind
    seq: int
    reply_to: int
    version: int
    tensors: Mapping[str, Any]
    scalars: Mapping[str, Scalar]


def sent(
    receiver: str, kind: Kind, seq: int, reply_to: int = 0, version: int = 0, shapes: Any = {}, **scalars: Scalar
) -> Sent:
    return Sent(receiver, kind, seq, reply_to, version, shapes, scalars)


def seen(effects: list[Effect], look: Callable[[torch.Tensor], Any] = lambda tensor: tuple(tensor.shape)) -> list[Any]:
    """Effects in their order, as values that are equal when they say the same."""

    def plain(effect: Any) -> Any:
        match effect:
            case Send(receiver, kind, seq, reply_to, version, tensors, scalars):
                looks = {name: look(tensor) for name, tensor in tensors.items()}
                return Sent(receiver, kind, seq, reply_to, version, looks, dict(scalars))
            case Finish(farewell):
                return Finish(tuple(map(plain, farewell)))
        return effect

    return [plain(effect) for effect in effects]


exact = partial(seen, look=torch.Tensor.tolist)
"""Effects with every value of every tensor."""


def from_server(
    kind: Kind, seq: int, reply_to: int = 0, version: int = 0, tensors: Tensors = {}, site: str = "east", **scalars: Any
) -> Message:
    """A message of the server."""
    return Message(Header("night", SERVER, site, kind, seq, reply_to, version), tensors, scalars)


def from_site(site: str, kind: Kind, seq: int, version: int = 0, tensors: Tensors = {}, **scalars: Scalar) -> Message:
    """A message of a site."""
    return Message(Header("night", site, SERVER, kind, seq, 0, version), tensors, scalars)


def manifest(config: RunConfig, site: str = "east") -> Message:
    return from_server(Kind.MANIFEST, 0, site=site, config=config.canonical(), contract=config.digest)


def greeting(config: RunConfig, site: str, **changed: Scalar) -> dict[str, Scalar]:
    """What an enrolled site's hello says."""
    counts = {name: len(getattr(tiny_splits(site), name)) for name in ("train", "validation", "test")}
    known = {"incarnation": f"{site}-1", "contract": config.digest, "enrolled": True}
    return {**known, **counts, "mark": 0, "released": 0, "log_lines": 0, "log_head": "", "sent": 0, **changed}


def hello(config: RunConfig, site: str, **changed: Scalar) -> Message:
    return from_site(site, Kind.HELLO, 0, **greeting(config, site, **changed))


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
