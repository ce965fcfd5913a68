"""Messages on which a role failed: each becomes a refusal, and none can stop a run.

    role.on(message) ──fails──▶ RoleFailedError ──▶ a new engine from the newest checkpoint, which refuses the message

The role is a new one, restored: the state of one that failed half-way cannot be trusted.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch

from nightsplit.shared.engine.counters import Counters
from nightsplit.shared.engine.mailbox import Received
from nightsplit.shared.errors import NightsplitError, Refused

T = TypeVar("T")

_NOT_THE_MESSAGE = (MemoryError, torch.OutOfMemoryError, OSError)
"""Failures of the machine, which the same message would survive on another day."""


class RoleFailedError(Exception):
    """A role failed on a message.

    Attributes:
        digest: sha256 of the message's body.
        refusal: with which an engine that begins anew refuses it.
    """

    def __init__(self, digest: str, refusal: Refused) -> None:
        super().__init__(str(refusal))
        self.digest, self.refusal = digest, refusal


def refusing_failures(attempt: Callable[[Mapping[str, Refused]], T]) -> T:
    """Run an engine until it ends, and one more for each message that its role failed on.

    Args:
        attempt: recovers an engine over a new link, with these messages to refuse, by digest, and runs it.
    """
    known: dict[str, Refused] = {}
    while True:
        try:
            return attempt(known)
        except RoleFailedError as failure:
            known[failure.digest] = failure.refusal


class Failures:
    """Holds messages responsible for what they make a role do.

    Args:
        known: refusals of messages that a role failed on before, by digest.
        counters: of the worker.
    """

    def __init__(self, known: Mapping[str, Refused], counters: Counters) -> None:
        self._known = known
        self._counters = counters

    def expect_sound(self, received: Received) -> None:
        """Raise the refusal of a message that is known."""
        if self._known and (refusal := self._known.get(_digest(received))) is not None:
            raise refusal

    @contextmanager
    def blame(self, received: Received) -> Iterator[None]:
        """Turn a failure of the block into one of the message, unless it is known: then the fault is ours.

        Raises:
            RoleFailedError: the role could not apply the message, or its answer cannot be sent.
        """
        try:
            yield
        except Exception as error:
            ours = isinstance(error, (NightsplitError, *_NOT_THE_MESSAGE)) and not isinstance(error, Refused)
            digest = _digest(received)
            if ours or digest in self._known:
                raise
            refusal = error if isinstance(error, Refused) else _unforeseen(received, error)
            self._counters.failed(received.header, refusal)
            raise RoleFailedError(digest, refusal) from error


def _unforeseen(received: Received, error: Exception) -> Refused:
    return Refused(
        316,
        f"{received.header.message_id}: {type(error).__name__} while it was applied.",
        "look at the log of the worker that refused it, and report it: it should have been refused before.",
    )


def _digest(received: Received) -> str:
    return hashlib.sha256(received.delivery.body).hexdigest()
