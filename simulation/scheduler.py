"""Whose turn it is: a heap of the turns to come, by round and place.

A worker that had something to do takes a step every round. One that had nothing to do rests, for longer each time,
until there is something again or a message comes for it. So the next turn costs the logarithm of the number of
workers, and those that wait cost nothing. Work takes no time on the clock; a round in which everybody rests does.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush

from typing_extensions import override

from nightsplit.shared.clock import Clock

ROUND_SECONDS = 0.001
LONGEST_REST = 1024
"""Rounds."""


@dataclass(frozen=True, order=True, slots=True)
class Turn:
    """A worker's next step."""

    round: int
    place: int
    worker: str = field(compare=False)


class Scheduler(Iterator[str]):
    """Names the worker whose turn it is, until none has a turn to come.

    Args:
        clock: sleeps while everybody rests.
        workers: in the order of their places; each has a turn in the first round.
    """

    def __init__(self, clock: Clock, workers: Iterable[str]) -> None:
        self._clock = clock
        self._heap = [Turn(0, place, worker) for place, worker in enumerate(workers)]
        self._next = {turn.worker: turn for turn in self._heap}
        """The one turn of each worker that counts; another one in the heap is void."""
        self._rest = dict.fromkeys(self._next, 1)
        self._now = Turn(0, -1, "")

    @override
    def __next__(self) -> str:
        while self._heap:
            turn = heappop(self._heap)
            if self._next.get(turn.worker) is not turn:
                continue
            if (skipped := turn.round - self._now.round - 1) > 0:
                self._clock.sleep(skipped * ROUND_SECONDS)
            self._now = self._next.pop(turn.worker)
            return turn.worker
        raise StopIteration

    def again(self, worked: bool) -> None:
        """Give the worker whose turn it is another one: in the next round, or after a rest if it had nothing to do."""
        worker = self._now.worker
        rest = 1 if worked else self._rest[worker]
        self._rest[worker] = 1 if worked else min(2 * rest, LONGEST_REST)
        self._plan(worker, self._now.place, self._now.round + rest)

    def wake(self, worker: str) -> None:
        """End a worker's rest: its turn comes when its place does."""
        if (turn := self._next.get(worker)) is None:
            return
        self._rest[worker] = 1
        soonest = self._now.round + (turn.place < self._now.place)
        if soonest < turn.round:
            self._plan(worker, turn.place, soonest)

    def _plan(self, worker: str, place: int, number: int) -> None:
        self._next[worker] = turn = Turn(number, place, worker)
        heappush(self._heap, turn)
