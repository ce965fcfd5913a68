"""What an engine may rely on, wherever checkpoints are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nightsplit.shared.errors import StateError
from nightsplit.shared.storage.checkpoint import Checkpoints, Snapshot
from nightsplit.simulation.checkpoints import MemoryCheckpoints


@pytest.fixture(params=["memory", "disk"])
def checkpoints(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoints:
    return MemoryCheckpoints() if request.param == "memory" else Checkpoints(tmp_path / "nowhere")


def snapshot(value: int) -> Snapshot:
    return Snapshot({"weights": torch.full((4, 4), float(value))}, {"value": value})


def written(checkpoints: Checkpoints, *numbers: tuple[int, int]) -> None:
    for fence, counter in numbers:
        checkpoints.write(fence, counter, snapshot(counter))
        checkpoints.prune()


def test_nothing_written_is_a_fresh_start(checkpoints: Checkpoints) -> None:
    assert checkpoints.load() is None
    assert checkpoints.last_fence == 0


def test_the_newest_is_loaded_as_it_was_written(checkpoints: Checkpoints) -> None:
    written(checkpoints, (1, 1), (1, 2))
    found = checkpoints.load()
    assert found is not None
    pointer, restored, damaged = found
    assert (pointer.fence, pointer.counter, restored.facts, damaged) == (1, 2, {"value": 2}, [])
    assert torch.equal(restored.tensors["weights"], torch.full((4, 4), 2.0))


def test_a_higher_fence_is_newer_than_a_higher_counter(checkpoints: Checkpoints) -> None:
    written(checkpoints, (1, 3), (2, 1))
    found = checkpoints.load()
    assert found is not None
    assert found[0].fence == checkpoints.last_fence == 2


def test_what_the_pointer_does_not_name_does_not_count(checkpoints: Checkpoints) -> None:
    pointer = checkpoints.write(1, 1, snapshot(1))
    checkpoints.write(1, 2, snapshot(2))  # written, and the crash came before its pointer was moved
    found = checkpoints.load(pointer)
    assert found is not None
    assert (found[0], found[1].facts) == (pointer, {"value": 1})


def test_the_newest_two_stay(checkpoints: Checkpoints) -> None:
    pointers = [checkpoints.write(1, counter, snapshot(counter)) for counter in (1, 2, 3)]
    checkpoints.prune()
    assert [found[1].facts["value"] for pointer in pointers[1:] if (found := checkpoints.load(pointer))] == [2, 3]
    with pytest.raises(StateError, match="E502"):
        checkpoints.load(pointers[0])


def test_numbers_as_names_of_facts(checkpoints: Checkpoints) -> None:
    """JSON makes them text, and sorts them otherwise: that is no damage."""
    checkpoints.write(0, 1, Snapshot({}, {"epochs": {2: "b", 10: "a"}}))
    found = checkpoints.load()
    assert found is not None
    assert found[1].facts == {"epochs": {"2": "b", "10": "a"}}


def test_what_is_loaded_belongs_to_the_caller(checkpoints: Checkpoints) -> None:
    written(checkpoints, (0, 1))
    for _ in range(2):
        found = checkpoints.load()
        assert found is not None
        assert found[1].facts == {"value": 1}
        assert torch.equal(found[1].tensors["weights"], torch.ones(4, 4))
        found[1].tensors["weights"].zero_()
        found[1].facts.clear()  # type: ignore[attr-defined]
