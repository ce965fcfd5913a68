"""Order of the workers' turns: a heap of the next turns, by round and place.

A worker that had work takes a step every round. One without work rests, longer each time, until it has work again or a
message arrives for it. So finding the next turn costs the logarithm of the number of workers, and resting workers cost
nothing. Work takes no time on the clock; a round in which all workers rest does.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush

from typing_extensions import override

from nightsplit.shared.clock import Clock

ROUND_SECONDS = 0.001
REST_ROUNDS_MAX = 1024


@dataclass(frozen=True, order=True, slots=True)
class Turn:
    """Turn of a worker; turns are ordered by round, and within a round by the workers' places."""

    round: int
    place: int
    worker: str = field(compare=False)


class Scheduler(Iterator[str]):
    """Iterator over the worker of each turn, until no worker has another one.

    Args:
        clock: sleeps while all workers rest.
        workers: workers in the order of their places; each has a turn in the first round.
    """

    def __init__(self, clock: Clock, workers: Iterable[str]) -> None:
        self._clock = clock
        self._heap = [Turn(0, place, worker) for place, worker in enumerate(workers)]
        self._next = {turn.worker: turn for turn in self._heap}
        """The valid turn of each worker; any other in the heap is void."""
        self._rest = dict.fromkeys(self._next, 1)
        """Rounds of the next rest of each worker."""
        self._current = Turn(0, -1, "")

    @override
    def __next__(self) -> str:
        while self._heap:
            turn = heappop(self._heap)
            if self._next.get(turn.worker) is not turn:
                continue
            if (skipped := turn.round - self._current.round - 1) > 0:
                self._clock.sleep(skipped * ROUND_SECONDS)
            self._current = self._next.pop(turn.worker)
            return turn.worker
        raise StopIteration

    def again(self, worked: bool) -> None:
        """Give the current worker another turn: in the next round, or after a rest if it had no work."""
        turn = self._current
        rest = 1 if worked else self._rest[turn.worker]
        self._rest[turn.worker] = 1 if worked else min(2 * rest, REST_ROUNDS_MAX)
        self._plan(Turn(turn.round + rest, turn.place, turn.worker))

    def wake(self, worker: str) -> None:
        """End a worker's rest: its next turn is the next one of its place."""
        if (turn := self._next.get(worker)) is None:
            return
        self._rest[worker] = 1
        soonest = self._current.round + (1 if turn.place < self._current.place else 0)
        if soonest < turn.round:
            self._plan(Turn(soonest, turn.place, worker))

    def _plan(self, turn: Turn) -> None:
        self._next[turn.worker] = turn
        heappush(self._heap, turn)
