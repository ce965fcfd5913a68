"""Query shape: a site sends queries, any active server answers them, and neither waits for the other.

    site                                             server
     ├── KEYS (public, in chunks) ────────────────▶   stores them under their sha256
     ├── QUERY 1 (in chunks) ─────────────────────▶   computes, without any state
     ◀── ANSWER 1 (in chunks), or UNANSWERED 1 ────┤   acknowledges the query when the answer is confirmed

A site numbers its queries, and stores the state of each in a file (`nightsplit.site_worker.query.store`). The server
has no state except the keys: after a crash the broker delivers the query again, and it is answered again. The site
uses the first answer and drops a second one. So a query takes effect exactly once, whichever side crashes.

A parcel is a sequence of byte strings, such as all ciphertexts of a query. It is sent in chunks below the broker's
limit; every chunk names the sha256 of the whole parcel, so that an altered parcel is never computed with.
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
"""Bytes of a message reserved for its header."""
CHUNKS_MAX = 64
"""Chunks of a parcel."""
KEYS_UNKNOWN = 314
"""Number of the refusal after which a site sends its public keys and the query again."""
BLINDED_ELSEWHERE = 315
"""Number of the refusal after which a site restarts the query."""


def _parcel(kind: Kind, reveals: Reveals, *texts: str) -> Payload:
    """Return the payload of a chunk; `texts` names the strings that each one carries."""
    return Payload(
        kind,
        {
            "content": TensorSpec(torch.uint8, ("bytes",), reveals=reveals),
            "sizes": TensorSpec(torch.int64, ("pieces",), reveals=reveals),
        },
        {
            "chunk": ScalarSpec(int, reveals, low=0, high=CHUNKS_MAX - 1),
            "chunks": ScalarSpec(int, reveals, low=1, high=CHUNKS_MAX),
            **{name: ScalarSpec(str, reveals) for name in ("sha256", *texts)},
        },
    )


CONTRACT = contract(
    _parcel(Kind.KEYS, Reveals.NOTHING),
    _parcel(Kind.QUERY, Reveals.CIPHERTEXT, "keys", "packing", "blinding"),
    _parcel(Kind.ANSWER, Reveals.CIPHERTEXT, "blinding"),
    Payload(Kind.UNANSWERED, scalars=REFUSAL),
)
"""Payload of each kind. `seq` in their headers is the number of the query, `version` the step of its evaluation.

`blinding` names the blinding of the state in an answer (name of the server's secret/nonce of the answer); the query
with the next step names it, too.
"""


def chunks(
    header: Header, pieces: Sequence[bytes], limit: int, scalars: Mapping[str, Scalar] = {}
) -> Iterator[Message]:
    """Split a parcel into messages of at most `limit` bytes with this header and these scalars.

    One piece, e.g. a ciphertext, may span several messages.
    """
    chunk_bytes = limit - HEADER_BYTES
    content = b"".join(pieces)
    sizes = torch.tensor([len(piece) for piece in pieces], dtype=torch.int64)
    count = max(1, -(-len(content) // chunk_bytes))
    sha256 = hashlib.sha256(content).hexdigest()
    for chunk in range(count):
        part = np.frombuffer(content[chunk * chunk_bytes : (chunk + 1) * chunk_bytes], dtype=np.uint8)
        tensors = {"content": torch.from_numpy(part.copy()), "sizes": sizes}
        yield Message(header, tensors, {**scalars, "chunk": chunk, "chunks": count, "sha256": sha256})


class Parcels:
    """Incomplete parcels; chunks may arrive twice, and again from the first after a crash of their sender."""

    def __init__(self) -> None:
        self._parts: dict[tuple[Kind, int, int], dict[int, Message]] = {}

    def add(self, message: Message) -> list[bytes] | None:
        """Add a chunk; return the pieces of its parcel once it is complete; Refused 304 if it is invalid or altered."""
        header, scalars = message.header, message.scalars
        chunk, count = int(scalars["chunk"]), int(scalars["chunks"])
        if not 0 <= chunk < count <= CHUNKS_MAX:
            raise mismatch(f"chunk {chunk} of {count} is impossible.")
        parcel = (header.kind, header.seq, header.version)
        parts = self._parts.setdefault(parcel, {})
        if any(part.scalars[key] != scalars[key] for part in parts.values() for key in ("sha256", "chunks")):
            parts.clear()  # its sender crashed meanwhile, and has encrypted it again
        parts[chunk] = message
        if len(parts) < count:
            return None
        del self._parts[parcel]
        content = b"".join(parts[n].tensors["content"].numpy().tobytes() for n in range(count))
        sizes = message.tensors["sizes"].tolist()
        if hashlib.sha256(content).hexdigest() != scalars["sha256"] or min(sizes) < 0 or sum(sizes) != len(content):
            raise Refused(304, f"{header.message_id} was altered on its way.", "submit it again.")
        return [content[end - size : end] for end, size in zip(accumulate(sizes), sizes, strict=True)]
