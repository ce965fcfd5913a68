"""Failures of a role on a message: each becomes a refusal, and none can stop a run.

    role.on(message) ──fails──▶ RoleFailedError ──▶ a new engine from the newest checkpoint, which refuses the message

The new engine restores a new role: the state of one that failed half-way cannot be trusted.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from logging import ERROR
from typing import TypeVar

import torch

from nightsplit.shared.engine.mailbox import Received
from nightsplit.shared.errors import NightsplitError, Refused
from nightsplit.shared.log import event

T = TypeVar("T")

_MACHINE_FAILURES = (MemoryError, torch.OutOfMemoryError, OSError)
"""Failures of the machine, which do not depend on the message."""


class RoleFailedError(Exception):
    """Failure of a role on a message: SHA-256 of its body, and its refusal by the next engine."""

    def __init__(self, digest: str, refusal: Refused) -> None:
        super().__init__(str(refusal))
        self.digest, self.refusal = digest, refusal


def refusing_failures(attempt: Callable[[Mapping[str, Refused]], T]) -> T:
    """Run an engine until it ends, and another one after each message that its role failed on.

    `attempt` recovers and runs an engine over a new link; it gets the refusals of such messages by digest.
    """
    refusals: dict[str, Refused] = {}
    while True:
        try:
            return attempt(refusals)
        except RoleFailedError as failure:
            refusals[failure.digest] = failure.refusal


class Failures:
    """Messages that a role failed on before: their refusals by digest."""

    def __init__(self, refusals: Mapping[str, Refused]) -> None:
        self._refusals = refusals

    def check(self, received: Received) -> None:
        """Raise the refusal of a message that a role failed on before."""
        if self._refusals and (refusal := self._refusals.get(_digest(received))) is not None:
            raise refusal

    @contextmanager
    def blame(self, received: Received) -> Iterator[None]:
        """Raise an exception that the message caused as RoleFailedError, unless it was refused for one before."""
        try:
            yield
        except Exception as error:
            is_blameless = isinstance(error, (NightsplitError, *_MACHINE_FAILURES)) and not isinstance(error, Refused)
            digest = _digest(received)
            if is_blameless or digest in self._refusals:
                raise
            refusal = error if isinstance(error, Refused) else _unforeseen(received, error)
            message = received.header.message_id
            event("role_failed", ERROR, number=refusal.number, message=message, reason=refusal.sentence)
            raise RoleFailedError(digest, refusal) from error


def _unforeseen(received: Received, error: Exception) -> Refused:
    sentence = f"{received.header.message_id}: {type(error).__name__} while it was applied."
    remedy = "inspect the log of the worker that refused it, and report this as a bug in nightsplit."
    return Refused(316, sentence, remedy)


def _digest(received: Received) -> str:
    return hashlib.sha256(received.delivery.body).hexdigest()
