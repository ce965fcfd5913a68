"""How a site and the server agree on a run before anything of a patient is sent; the same in every system."""

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.errors import TITLES, RunError
from nightsplit.shared.wire.message import Kind
from nightsplit.shared.wire.schema import Payload, Reveals, ScalarSpec

ANY = ""
"""In a rejection: it holds for every incarnation of the site."""

VERDICT = {"best": ScalarSpec(int, low=0), "judged": ScalarSpec(int, low=0)}
"""In every answer: the best epoch so far, and the last one that was judged (0: none)."""

_FACT, _COUNT = ScalarSpec(int, Reveals.NOTHING, low=0), ScalarSpec(int, Reveals.COUNTS, low=0)
_TEXT, _NUMBER = ScalarSpec(str, Reveals.NOTHING), ScalarSpec(int, low=min(TITLES), high=max(TITLES))

AGREEMENT = (
    Payload(Kind.MANIFEST, scalars={"config": _TEXT, "contract": _TEXT}),
    Payload(
        Kind.HELLO,
        scalars={
            "incarnation": _TEXT, "enrolled": ScalarSpec(bool, Reveals.NOTHING), "contract": _TEXT,
            "train": _COUNT, "validation": _COUNT, "test": _COUNT, "mark": _FACT, "released": _FACT,
        },
    ),
    Payload(Kind.REJECTED, scalars={"incarnation": _TEXT, "number": _NUMBER, "reason": _TEXT}),
)  # fmt: skip
"""Payloads of the greetings."""

REFUSAL = {"number": _NUMBER, "reason": _TEXT}
"""In the answer to a message that was refused."""


def check_digest(stored: str, config: RunConfig, who: str) -> None:
    """Let a worker go on with the run.toml that its state was made with; RunError 601 where it has changed."""
    if stored != config.digest:
        what = f"{who} began {config.run.id} with another run.toml."
        remedy = "restore the file as it was, or start a new run under another id. Nothing more was sent."
        raise RunError(601, what, remedy)
