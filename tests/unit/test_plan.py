"""The plan and the sequence of messages: both sides must derive the same from the same counts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nightsplit.shared.protocols.plan import Item, Plan, Step
from nightsplit.shared.protocols.stream import UpSequence

PLANS = st.builds(
    Plan,
    train=st.integers(1, 60),
    validation=st.integers(0, 20),
    test=st.integers(0, 20),
    batch_size=st.integers(1, 16),
    epochs=st.integers(1, 5),
    evaluate_every=st.integers(1, 3),
    average_every=st.none() | st.integers(1, 7),
    window=st.integers(1, 70),
)


@given(PLANS)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_sample_is_trained_once_per_epoch_and_evaluated_once_per_block(plan):
    seen = {}
    for q in range(1, plan.last + 1):
        item = plan.item(q)
        seen.setdefault((item.epoch, item.step), []).extend(plan.rows(q))
    for epoch in range(1, plan.epochs + 1):
        assert seen[epoch, Step.TRAIN] == list(range(plan.train))
        evaluates = epoch in plan.evaluated_epochs()
        assert seen.get((epoch, Step.VALIDATION), []) == (list(range(plan.validation)) if evaluates else [])
    assert plan.evaluated_epochs()[-1] == plan.epochs
    assert sum(plan.item(q).step is Step.AVERAGE for q in range(1, plan.last + 1)) == plan.averagings


@given(PLANS)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_places_and_versions_never_go_back(plan):
    items = range(1, plan.last + 1)
    assert [plan.place(q) for q in items] == sorted(plan.place(q) for q in items)
    versions = [plan.version_of(q) for q in items]
    assert versions == sorted(versions)
    assert all(0 <= version <= max(0, q - plan.window) for q, version in zip(items, versions, strict=True))


@given(PLANS)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_an_evaluation_block_uses_one_version(plan):
    blocks = {}
    for q in range(1, plan.last + 1):
        if plan.item(q).evaluates:
            blocks.setdefault(plan.item(q).epoch, set()).add(plan.version_of(q))
    assert all(len(versions) == 1 for versions in blocks.values())


@given(PLANS, st.booleans())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_a_sequence_holds_every_half_once_and_never_waits_for_itself(plan, has_head):
    sequence = UpSequence(plan, has_head)
    order = [sequence.at(seq) for seq in range(1, sequence.last + 1)]
    halves = ("first", "second") if has_head else ("first",)
    assert sorted(order) == sorted((q, half) for q in range(1, plan.last + 1) for half in halves)
    position = {what: seq for seq, what in enumerate(order, 1)}
    for q in range(1, plan.last + 1):
        assert position[q, "first"] == sequence.seq_of_first(q)
        assert position[q, halves[-1]] == sequence.settles(q)
        if q > plan.window:  # the forward of q needs the answer that settles q - window
            assert sequence.settles(q - plan.window) < sequence.seq_of_first(q)
    places = [sequence.place(seq) for seq in range(1, sequence.last + 1)]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("window", "expected"),
    [(1, "F1 S1 F2 S2 F3 S3 F4 S4"), (4, "F1 F2 F3 S1 F4 S2 S3 S4"), (100, "F1 F2 F3 F4 S1 S2 S3 S4")],
)
def test_the_order_of_halves(window, expected):
    plan = Plan(4, 0, 0, 1, 1, 1, None, window)
    sequence = UpSequence(plan, has_head=True)
    names = [f"{half[0].upper()}{q}" for q, half in (sequence.at(seq) for seq in range(1, sequence.last + 1))]
    assert " ".join(names) == expected


def test_batches_are_even():
    assert [len(Item(Step.TRAIN, 1, batch, 3).rows(10)) for batch in range(3)] == [3, 3, 4]
