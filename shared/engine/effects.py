"""What a role may ask of the engine. Roles decide, the engine acts."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from nightsplit.shared.wire.message import Kind, Scalar


@dataclass(frozen=True, slots=True, eq=False)
class Send:
    """Publish a message. The engine adds run, sender and fence.

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
    """Write a line of metrics. A replay after a crash may record the same line again."""

    metrics: Mapping[str, Scalar | None]


@dataclass(frozen=True, slots=True)
class Spend:
    """Pay, durably, for differential privacy before what comes behind is performed.

    Attributes:
        steps: private training steps so far, all that leave with the next messages included.
    """

    steps: int


@dataclass(frozen=True, slots=True)
class Finish:
    """The role's work is done: make the end durable, then say the last words and leave.

    Attributes:
        farewell: messages that may be sent only when every kept checkpoint holds the end.
    """

    farewell: tuple[Send, ...] = ()


Effect = Send | Record | Spend | Finish


def unpaid(spend: Spend) -> None:
    """Stand for the ledger where there is none, so that no role trains privately without paying."""
    raise AssertionError("a role that spends privacy needs a ledger")
