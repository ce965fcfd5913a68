"""Handshake of a site and the server before any patient's data is sent; the same in every protocol."""

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.errors import TITLES, RunError
from nightsplit.shared.wire.message import Kind
from nightsplit.shared.wire.schema import Payload, Reveals, ScalarSpec

PROGRESS = {"best": ScalarSpec(int, low=0), "judged": ScalarSpec(int, low=0)}
"""Scalars of every answer: the best epoch so far, and the last evaluated one (0: none)."""

_SEQ, _COUNT = ScalarSpec(int, Reveals.NOTHING, low=0), ScalarSpec(int, Reveals.COUNTS, low=0)
_TEXT, _NUMBER = ScalarSpec(str, Reveals.NOTHING), ScalarSpec(int, low=min(TITLES), high=max(TITLES))

HANDSHAKE = (
    Payload(Kind.MANIFEST, scalars={"config": _TEXT, "contract": _TEXT}),
    Payload(
        Kind.HELLO,
        scalars={
            "incarnation": _TEXT, "enrolled": ScalarSpec(bool, Reveals.NOTHING), "contract": _TEXT,
            "train": _COUNT, "validation": _COUNT, "test": _COUNT, "mark": _SEQ, "released": _SEQ,
            "log_lines": _SEQ, "log_head": _TEXT, "sent": _SEQ,
        },
    ),
    Payload(Kind.REJECTED, scalars={"incarnation": _TEXT, "number": _NUMBER, "reason": _TEXT}),
    Payload(Kind.EXCLUDED, scalars={"reason": _TEXT}),
    Payload(Kind.WITNESSED, scalars={"lines": _SEQ, "head_signed": _TEXT, "signature": _TEXT}),
)  # fmt: skip
"""Payloads of the handshake; `contract` is the digest of the run, `log_lines` and `log_head` are
the length and head of the site's exit log, which has its messages up to number `sent`. A rejection names the hello that
it answers."""

REFUSAL = {"number": _NUMBER, "reason": _TEXT}
"""Scalars of the answer to a refused message."""


def check_digest(stored: str, config: RunConfig, who: str) -> None:
    """Check that a worker's state belongs to this run.toml; RunError 601 if the file has changed."""
    if stored != config.digest:
        sentence = f"{who} began {config.run.id} with another run.toml."
        remedy = "restore the file as it was, or start a new run under another id. Nothing more was sent."
        raise RunError(601, sentence, remedy)
