"""Crash points: positions in the code where a test can end the process like kill -9.

    engine       apply a message, publish its effects ─▶ after_apply
                 before_confirm ─▶ count a confirm ─▶ after_confirm
    checkpoint   write and fsync files ─▶ checkpoint_written ─▶ fsync folder ─▶ checkpoint_synced
                 before_rename ─▶ rename ─▶ after_rename
    engine       move the pointer ─▶ before_ack ─▶ acknowledge a message ─▶ after_ack

NIGHTSPLIT_CRASH="before_ack:3" ends the process when it reaches `before_ack` for the third time, at
once: no handler, no flush, no message to the broker.
"""

import os
from collections import Counter
from typing import Literal, get_args

Point = Literal[
    "after_apply", "before_confirm", "after_confirm",
    "checkpoint_written", "checkpoint_synced", "before_rename", "after_rename",
    "before_ack", "after_ack",
]  # fmt: skip
POINTS: tuple[Point, ...] = get_args(Point)
VARIABLE = "NIGHTSPLIT_CRASH"
EXIT_CODE = 137
"""Exit code that a shell reports for a process ended by SIGKILL."""

_point, _, _number = os.environ.get(VARIABLE, "").partition(":")
_reached: Counter[str] = Counter()


def reach(point: Point) -> None:
    """End the process here, if the environment selects this point."""
    if point != _point:
        return
    _reached[point] += 1
    if _reached[point] == int(_number):
        os._exit(EXIT_CODE)
