"""How a site and the server agree on a run before anything of a patient is sent; the same in every system."""

from __future__ import annotations

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.errors import RunError
from nightsplit.shared.wire.message import Kind
from nightsplit.shared.wire.schema import Payload

ANY = ""
"""In a rejection: it holds for every incarnation of the site."""

VERDICT = {"best": int, "judged": int}
"""In every answer: the best epoch so far, and the last one that was judged (0: none)."""

AGREEMENT = {
    Kind.MANIFEST: Payload(scalars={"config": str, "contract": str}),
    Kind.HELLO: Payload(
        scalars={
            "incarnation": str, "enrolled": bool, "contract": str, "train": int, "validation": int, "test": int,
            "mark": int, "released": int,
        }
    ),
    Kind.REJECTED: Payload(scalars={"incarnation": str, "number": int, "reason": str}),
}  # fmt: skip
"""The contract of the greetings."""


def check_contract(stored: str, config: RunConfig, who: str) -> None:
    """A worker goes on with the run.toml that its state was made with.

    Raises:
        RunError: 601 the file changed in between.
    """
    if stored != config.contract:
        raise RunError(
            601,
            f"{who} began {config.run.id} with another run.toml.",
            "restore the file as it was, or start a new run under another id. Nothing more was sent.",
        )
