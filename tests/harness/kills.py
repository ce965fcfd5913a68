"""A command that is killed at a chosen call of its link."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from itertools import count

from nightsplit.broker.embedded.link import EmbeddedLink
from nightsplit.broker.rabbitmq.link import RabbitLink


def is_killed(act: Callable[[], object], method: str, number: int) -> bool:
    """Carry out `act` in a process that kills itself at call `number` of a link's `method`; False: it ended before."""
    child = os.fork()
    if child == 0:
        calls = count(1)

        def dying(original: Callable[..., None]) -> Callable[..., None]:
            def call(*arguments: object) -> None:
                if next(calls) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                original(*arguments)

            return call

        for kind in (EmbeddedLink, RabbitLink):
            setattr(kind, method, dying(getattr(kind, method)))
        try:
            act()
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0
