"""The Query shape: a site asks, whichever server is up answers, and neither waits for the other.

    site                                             server
     ├── KEYS (public, in chunks) ────────────────▶   keeps them under their sha256
     ├── QUERY 1 (in chunks) ─────────────────────▶   computes, and remembers nothing
     ◀── ANSWER 1 (in chunks), or UNANSWERED 1 ────┤   acknowledges the query when the answer is confirmed

A site numbers its queries, and keeps what it needs for an answer in a file of its own
(`nightsplit.site_worker.query.store`). The server has no state but the keys: after a crash the broker delivers the
query again, and it is answered again. The site takes the first answer and drops a second one. So a query has its effect
exactly once, whoever dies.

A parcel is what belongs together: all ciphertexts of a query, say. It travels in chunks below the broker's limit;
a chunk names the sha256 of the whole parcel, so that nothing is computed with what was altered on the way.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

import numpy as np
import torch

from nightsplit.shared.errors import Refused, mismatch
from nightsplit.shared.protocols.handshake import REFUSAL
from nightsplit.shared.wire.message import Header, Kind, Message, Scalar
from nightsplit.shared.wire.schema import Payload, Reveals, ScalarSpec, TensorSpec, contract

HEADER_BYTES = 32 * 2**10
"""Of a message, left for its header."""
MOST_CHUNKS = 64
"""Of a parcel."""
KEYS_UNKNOWN = 314
"""Number of the refusal after which a site sends its public keys, and the query, once more."""
BLINDED_ELSEWHERE = 315
"""Number of the refusal after which a site begins the query once more."""


def _parcel(kind: Kind, reveals: Reveals, *more: str) -> Payload:
    """Return the payload of a chunk; `more` names texts that each one carries."""
    return Payload(
        kind,
        {
            "content": TensorSpec(torch.uint8, ("bytes",), reveals=reveals),
            "sizes": TensorSpec(torch.int64, ("pieces",), reveals=reveals),
        },
        {
            "chunk": ScalarSpec(int, reveals, low=0, high=MOST_CHUNKS - 1),
            "chunks": ScalarSpec(int, reveals, low=1, high=MOST_CHUNKS),
            **{name: ScalarSpec(str, reveals) for name in ("sha256", *more)},
        },
    )


CONTRACT = contract(
    _parcel(Kind.KEYS, Reveals.NOTHING),
    _parcel(Kind.QUERY, Reveals.CIPHERTEXT, "keys", "packing", "blinding"),
    _parcel(Kind.ANSWER, Reveals.CIPHERTEXT, "blinding"),
    Payload(Kind.UNANSWERED, scalars=REFUSAL),
)
"""Payload of each kind. `seq` in their headers is the number of the query, `version` the step of its evaluation.

`blinding` names what the state in an answer is blinded with (name of the server's secret/nonce of the answer); the
query with the next step names it, too.
"""


def chunks(
    header: Header, pieces: Sequence[bytes], limit: int, scalars: Mapping[str, Scalar] = {}
) -> Iterator[Message]:
    """The messages of a parcel.

    Args:
        header: of each of them.
        pieces: what is sent, e.g. a ciphertext each; a longer one than a message goes into several.
        limit: largest message in bytes.
        scalars: what else each of them carries.
    """
    room = limit - HEADER_BYTES
    content = b"".join(pieces)
    sizes = torch.tensor([len(piece) for piece in pieces], dtype=torch.int64)
    number = max(1, -(-len(content) // room))
    sha256 = hashlib.sha256(content).hexdigest()
    for chunk in range(number):
        part = np.frombuffer(content[chunk * room : (chunk + 1) * room], dtype=np.uint8)
        tensors = {"content": torch.from_numpy(part.copy()), "sizes": sizes}
        yield Message(header, tensors, {**scalars, "chunk": chunk, "chunks": number, "sha256": sha256})


class Parcels:
    """Parcels that are coming in; chunks may come twice, and anew from the first after a crash of their sender."""

    def __init__(self) -> None:
        self._parts: dict[tuple[Kind, int, int], dict[int, Message]] = {}

    def add(self, message: Message) -> list[bytes] | None:
        """Take a chunk; the pieces of its parcel when it was the last one missing.

        Raises:
            Refused: 304 its place among the chunks is impossible, or the parcel is not what was sent. It is forgotten.
        """
        header, scalars = message.header, message.scalars
        chunk, number = int(scalars["chunk"]), int(scalars["chunks"])
        if not 0 <= chunk < number <= MOST_CHUNKS:
            raise mismatch(f"chunk {chunk} of {number} is impossible.")
        name = (header.kind, header.seq, header.version)
        parts = self._parts.setdefault(name, {})
        if any(known.scalars[same] != scalars[same] for known in parts.values() for same in ("sha256", "chunks")):
            parts.clear()  # its sender has died meanwhile, and has encrypted it anew
        parts[chunk] = message
        if len(parts) < number:
            return None
        del self._parts[name]
        content = b"".join(parts[n].tensors["content"].numpy().tobytes() for n in range(number))
        sizes = message.tensors["sizes"].tolist()
        if hashlib.sha256(content).hexdigest() != scalars["sha256"] or min(sizes) < 0 or sum(sizes) != len(content):
            raise Refused(304, f"{header.message_id} was altered on its way.", "submit it again.")
        return [content[end - size : end] for end, size in zip(accumulate(sizes), sizes, strict=True)]
