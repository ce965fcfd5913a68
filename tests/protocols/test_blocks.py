"""Plan and sequence of a run that learns by targets, and how many nights it takes."""

from itertools import pairwise, takewhile

import pytest

from nightsplit.shared.protocols.blocks import BlockPlan, BlockSequence
from nightsplit.shared.protocols.plan import Purpose
from nightsplit.shared.wire.message import SERVER
from tests.harness.night import Night, tiny_config

SIZES = [(100, 20, 20, 3, 1, 4), (37, 5, 0, 4, 3, 2), (10, 0, 7, 2, 2, 10), (3, 0, 0, 1, 1, 4), (64, 9, 9, 3, 2, 3)]
"""Samples of each part, epochs, epochs between evaluations, window."""


@pytest.fixture(params=SIZES, ids=str)
def sizes(request):
    return request.param


@pytest.fixture(params=[None, 1], ids=["independent", "averaged"])
def plan(request, sizes, has_head):
    train, validation, test, epochs, every, window = sizes
    lag = 2 if has_head else 1
    return BlockPlan(train, validation, test, 8, epochs, every, request.param, window, lag=lag)


@pytest.fixture(params=[False, True], ids=["without head", "with head"])
def has_head(request):
    return request.param


def test_blocks_are_whole_and_even(plan):
    items = [plan.item(q) for q in range(1, plan.last + 1)]
    for epoch in range(1, plan.epochs + 1):
        rows = [row for item in items if (item.purpose, item.epoch) == (Purpose.TRAIN, epoch) for row in item.rows]
        assert rows == list(range(plan.train))
    assert [plan.block_of(item.number) for item in items] == [
        block for block in range(1, plan.blocks + 1) for _ in plan.items(block)
    ]
    lengths = set()
    for block in range(1, plan.blocks + 1):
        of_block = [items[q - 1] for q in plan.items(block)]
        trained = [item for item in of_block if item.purpose is Purpose.TRAIN]
        lengths.add(len(trained))
        assert len({item.version for item in of_block}) == len({item.epoch for item in of_block}) == 1
        assert [item for item in of_block if plan.ends_training(item)] == trained[-1:]
        assert sum(item.purpose is Purpose.AVERAGE for item in of_block) == (plan.average_every or 0)
    assert min(lengths) >= 1
    assert max(lengths) <= min(plan.window, min(lengths) + 1)


def test_a_version_is_the_newest_that_a_whole_block_can_know(plan):
    for block in range(1, plan.blocks + 1):
        for q in plan.items(block):
            assert plan.item(q).version == max(0, block - plan.lag)


def test_a_night_is_the_second_halves_of_one_block_and_the_first_of_the_next(plan, has_head):
    sequence = BlockSequence(plan, has_head)
    slots = [sequence.slot(seq) for seq in range(1, sequence.last + 1)]
    expected = []
    for block in range(1, plan.blocks + 2):
        expected += [("second", q) for q in plan.items(block - 1) if has_head and block > 1]
        expected += [("first", q) for q in plan.items(block) if block <= plan.blocks]
    assert [(slot.half, slot.item.number) for slot in slots] == expected
    for slot in slots:
        place_of = sequence.seq_of_first if slot.half == "first" else sequence.completing_seq
        assert place_of(slot.item.number) == slot.seq
        assert slot.completes_item is (slot.half == "second" or not has_head)


def test_only_the_first_block_leaves_before_an_answer(plan, has_head):
    sequence = BlockSequence(plan, has_head)
    slots = (sequence.slot(seq) for seq in range(1, sequence.last + 1))
    alone = takewhile(lambda slot: slot.half == "first" and slot.item.version == 0, slots)
    assert len(list(alone)) == plan.unanswered


def test_places_never_decrease_and_what_is_learnt_comes_before_what_is_asked(plan, has_head):
    sequence = BlockSequence(plan, has_head)
    places = [sequence.place(seq) for seq in range(1, sequence.last + 1)]
    assert all(one <= other for one, other in pairwise(places))


def nights_of(night: Night, most: int) -> int:
    """Nights in which sites work while the server is away, each with a day after it for the server alone."""
    night.work(SERVER, idle_seconds=0.0)  # opens the run
    for number in range(1, most + 1):
        for site in night.config.run.sites:
            if site not in night.finished:
                night.work(site, idle_seconds=0.0)
        night.work(SERVER, idle_seconds=0.0)
        if SERVER in night.finished:
            return number
    raise AssertionError(f"not over after {most} nights")


@pytest.mark.parametrize("order", ["strict", "fair"])
@pytest.mark.parametrize("bottoms", ["independent", "averaged"])
@pytest.mark.parametrize(("protocol", "more"), [("split_labels", 0), ("split_u", 1)])
def test_so_many_passes_take_so_many_nights_and_one_for_the_head(protocol, more, bottoms, order, tmp_path):
    run = {"protocol": protocol, "bottoms": bottoms, "order": order, "window": 50, "epochs": 3}
    night = Night(tiny_config(**run, learning="targets"), tmp_path / "targets", prefetch=64)
    assert nights_of(night, 10) == 3 + more
    assert [entry["epoch"] for entry in night.server.evaluation.history] == [1, 2, 3]


def test_steps_need_more_nights(tmp_path):
    """Otherwise the test above would say little."""
    config = tiny_config(protocol="split_u", window=8, epochs=3)
    assert nights_of(Night(config, tmp_path, prefetch=64), 40) > 4
