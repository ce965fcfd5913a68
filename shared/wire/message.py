"""Message: a frozen header, named tensors and named scalars.

Content is a pure function of (configuration, data, run seed, applied history), so that a message
published again after a crash is byte-equal to its first copy, except for the fence.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import torch

WIRE_VERSION = 1

ENVELOPE_BYTES = 141
"""Bytes that an envelope adds to a message (`nightsplit.shared.trust.envelope`)."""

Scalar = bool | int | float | str


class Kind(StrEnum):
    """Kind of a message. `nightsplit.shared.protocols` defines the payload of each."""

    MANIFEST = "manifest"  # server -> site: the open run; first in every down queue
    HELLO = "hello"  # site -> server: the site's plan and run digest
    SMASHED = "smashed"  # site -> server: activations at the cut
    HEAD_GRADIENT = "head_gradient"  # site -> server: gradient at the head's input (split_u)
    HEAD_TARGET = "head_target"  # site -> server: displacement of the head's input (split_u)
    REPORT = "report"  # site -> server: the site's own metrics (split_u, rounds)
    BOTTOM = "bottom"  # site -> server: weights to be averaged
    UPDATE = "update"  # site -> server: change of the model by a site's training, a slice of it
    KEYS = "keys"  # site -> server: public keys, a chunk of them
    QUERY = "query"  # site -> server: encrypted input, a chunk of it
    CUT_GRADIENT = "cut_gradient"  # server -> site: gradient at the cut
    CUT_TARGET = "cut_target"  # server -> site: displacement of activations at the cut
    HEAD_INPUT = "head_input"  # server -> site: activations for the head (split_u)
    AVERAGE = "average"  # server -> site: averaged bottom weights
    MODEL = "model"  # server -> site: the combined model, a slice of it
    ANSWER = "answer"  # server -> site: result of a query, a chunk of it
    UNANSWERED = "unanswered"  # server -> site: the query cannot be evaluated
    NOTED = "noted"  # server -> site: applied; there is no content to return
    REFUSED = "refused"  # server -> site: not applied, counts as applied
    REJECTED = "rejected"  # server -> site: the hello is not accepted
    EXCLUDED = "excluded"  # server -> site: the run went on without the site
    WITNESSED = "witnessed"  # server -> site: co-signature of the site's exit log
    RECEIPT = "receipt"  # server -> site: how far it has sent, and messages of the site that it lacks
    FINISH = "finish"  # server -> site: the run is over


UNSEQUENCED = frozenset({Kind.MANIFEST, Kind.HELLO, Kind.REJECTED, Kind.EXCLUDED, Kind.WITNESSED, Kind.RECEIPT})
"""Kinds with seq 0, since their number would depend on timing; they may be repeated."""

FROM_SITES = frozenset({
    Kind.HELLO, Kind.SMASHED, Kind.HEAD_GRADIENT, Kind.HEAD_TARGET, Kind.REPORT, Kind.BOTTOM, Kind.UPDATE, Kind.KEYS,
    Kind.QUERY,
})  # fmt: skip
"""Kinds that sites send; the server sends the others."""


@dataclass(frozen=True, slots=True)
class Header:
    """Identity of a message: run, sender, receiver, kind and sequence number.

    Attributes:
        run: id of the run.
        sender: site name, or `SERVER`.
        receiver: site name, or `SERVER`.
        kind: kind of the message.
        seq: 1, 2, 3... per (run, sender, receiver); 0 for kinds in `UNSEQUENCED`.
        reply_to: seq of the message that this one answers; 0 for none.
        version: version of the bottom's weights (number of gradients applied) that the content belongs to.
        fence: incarnation of the sending server; 0 from a site. Not part of the content.
    """

    run: str
    sender: str
    receiver: str
    kind: Kind
    seq: int
    reply_to: int = 0
    version: int = 0
    fence: int = 0

    @property
    def message_id(self) -> str:
        """Identifier that all copies of a message share, and no other message has."""
        return f"{self.run}/{self.sender}/{self.receiver}/{self.kind}/{self.seq}"


@dataclass(frozen=True, slots=True, eq=False)
class Message:
    """Header with tensors and scalars by name.

    Tensors are on the CPU. From the wire they may be read-only views: never write in place.
    """

    header: Header
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    scalars: Mapping[str, Scalar] = field(default_factory=dict)


SERVER = "server"
"""Name of the server as sender and receiver; not allowed for a site."""
