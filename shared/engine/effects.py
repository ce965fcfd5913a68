"""Effects that a role requests from the engine. Roles decide, the engine acts."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from nightsplit.shared.wire.message import Kind, Scalar


@dataclass(frozen=True, slots=True, eq=False)
class Send:
    """Message to publish. The engine adds run, sender and fence.

    Attributes as in `nightsplit.shared.wire.message.Header` and `Message`.
    """

    receiver: str
    kind: Kind
    seq: int
    reply_to: int = 0
    version: int = 0
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    scalars: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Record:
    """Line of metrics to write. A replay after a crash may write the same line again."""

    metrics: Mapping[str, Scalar | None]


@dataclass(frozen=True, slots=True)
class Spend:
    """Number of private training steps so far, recorded durably before the messages that result from them are sent."""

    steps: int


@dataclass(frozen=True, slots=True)
class Cosigned:
    """Co-signature of the server that a site keeps in its exit log: `lines`, `head_signed` and `signature`."""

    signed: Mapping[str, Scalar]


@dataclass(frozen=True, slots=True)
class Again:
    """Messages to send again to a receiver that lacks them, by number."""

    receiver: str
    seqs: range


@dataclass(frozen=True, slots=True)
class Expect:
    """Number of the last message that a sender had sent before the present one: all up to it are here, or were lost."""

    sender: str
    last: int


@dataclass(frozen=True, slots=True)
class Release:
    """Number up to which a receiver has saved the messages to it, so that it can no longer lack one."""

    receiver: str
    last: int


@dataclass(frozen=True, slots=True)
class Finish:
    """End of the role's work; the farewell is sent once every kept checkpoint contains the end."""

    farewell: tuple[Send, ...] = ()


Effect = Send | Record | Spend | Cosigned | Again | Expect | Release | Finish


def forbid_spending(spend: Spend) -> None:
    """Raise AssertionError, in place of a ledger, so that no role trains privately without one."""
    raise AssertionError("a role that spends privacy needs a ledger")
