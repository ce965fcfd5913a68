"""The plan and the sequence of messages: both sides must derive the same from the same counts."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nightsplit.shared.protocols.plan import Plan, Purpose
from nightsplit.shared.protocols.stream import StreamSequence
from nightsplit.shared.wire.message import SERVER
from tests.harness.night import Night, tiny_config

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


def items_of(plan):
    return [plan.item(q) for q in range(1, plan.last + 1)]


def evaluates(plan, epoch):
    return epoch % plan.evaluate_every == 0 or epoch == plan.epochs


def full_batches(plan, samples):
    """As many as can be filled; a part that fills none is one batch of what there is."""
    return samples // plan.batch_size or bool(samples)


def listed(plan):
    """Purpose, epoch and batch of every item, one after the other, as a site goes through them."""
    trained = 0
    for epoch in range(1, plan.epochs + 1):
        for batch in range(full_batches(plan, plan.train)):
            yield Purpose.TRAIN, epoch, batch
            trained += 1
            if plan.average_every and trained % plan.average_every == 0:
                yield Purpose.AVERAGE, epoch, batch
        if evaluates(plan, epoch):
            for purpose, samples in ((Purpose.VALIDATION, plan.validation), (Purpose.TEST, plan.test)):
                yield from ((purpose, epoch, batch) for batch in range(full_batches(plan, samples)))


@given(PLANS)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_items_are_those_of_a_walk_through_the_run(plan):
    items = items_of(plan)
    assert [(item.purpose, item.epoch, item.batch) for item in items] == list(listed(plan))
    assert [item.number for item in items] == list(range(1, plan.last + 1))
    last_of_epoch = {item.epoch: item for item in items}
    assert all(plan.end(epoch) == item.number for epoch, item in last_of_epoch.items())
    ends = {item.number for item in last_of_epoch.values() if item.evaluates}
    assert {item.number for item in items if item.ends_block} == ends
    assert sum(item.purpose is Purpose.AVERAGE for item in items) == plan.averagings


@given(PLANS)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_sample_is_trained_once_per_epoch_and_evaluated_once_per_block(plan):
    seen = {}
    for item in items_of(plan):
        seen.setdefault((item.epoch, item.purpose), []).extend(item.rows)
    for epoch in range(1, plan.epochs + 1):
        assert seen[epoch, Purpose.TRAIN] == list(range(plan.train))
        held_out = list(range(plan.validation)) if evaluates(plan, epoch) else []
        assert seen.get((epoch, Purpose.VALIDATION), []) == held_out


@given(PLANS)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_places_and_versions_never_go_back(plan):
    items = items_of(plan)
    assert [item.place for item in items] == sorted(item.place for item in items)
    assert [item.version for item in items] == sorted(item.version for item in items)
    assert all(0 <= item.version <= max(0, item.number - plan.window) for item in items)


@given(PLANS)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_an_evaluation_block_uses_one_version(plan):
    blocks = {}
    for item in items_of(plan):
        if item.evaluates:
            blocks.setdefault(item.epoch, set()).add(item.version)
        else:
            assert item.version == max(0, item.number - plan.window)
    assert all(len(versions) == 1 for versions in blocks.values())


@given(PLANS, st.booleans())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_a_sequence_holds_every_half_once_and_never_waits_for_itself(plan, has_head):
    sequence = StreamSequence(plan, has_head)
    slots = [sequence.slot(seq) for seq in range(1, sequence.last + 1)]
    halves = ("first", "second") if has_head else ("first",)
    order = [(slot.item.number, slot.half) for slot in slots]
    assert sorted(order) == sorted((q, half) for q in range(1, plan.last + 1) for half in halves)
    position = {what: seq for seq, what in enumerate(order, 1)}
    for q in range(1, plan.last + 1):
        assert position[q, "first"] == sequence.seq_of_first(q)
        assert position[q, halves[-1]] == sequence.completing_seq(q)
        if q > plan.window:  # the forward of q needs the answer that settles q - window
            assert sequence.completing_seq(q - plan.window) < sequence.seq_of_first(q)
    assert all(slot.completes_item is (slot.seq == sequence.completing_seq(slot.item.number)) for slot in slots)
    places = [sequence.place(seq) for seq in range(1, sequence.last + 1)]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("window", "expected"),
    [(1, "F1 S1 F2 S2 F3 S3 F4 S4"), (4, "F1 F2 F3 S1 F4 S2 S3 S4"), (100, "F1 F2 F3 F4 S1 S2 S3 S4")],
)
def test_the_order_of_halves(window, expected):
    plan = Plan(4, 0, 0, 1, 1, 1, None, window)
    sequence = StreamSequence(plan, has_head=True)
    slots = [sequence.slot(seq) for seq in range(1, sequence.last + 1)]
    assert " ".join(f"{slot.half[0].upper()}{slot.item.number}" for slot in slots) == expected


@given(PLANS)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_no_message_is_left_with_few_patients(plan):
    parts = {Purpose.TRAIN: plan.train, Purpose.VALIDATION: plan.validation, Purpose.TEST: plan.test}
    rows = {part: [len(item.rows) for item in items_of(plan) if item.purpose is part] for part in parts}
    for part, samples in parts.items():
        assert all(min(samples, plan.batch_size) <= n < 2 * plan.batch_size for n in rows[part])
        assert not rows[part] or max(rows[part]) - min(rows[part]) <= 1


def test_a_rest_is_spread():
    rows = [len(item.rows) for item in items_of(Plan(17, 3, 1, 16, 1, 1, None, 1))]
    assert rows == [17, 3, 1]  # and not 8, 9, 3, 1: min_batch = 16 holds for the training patients
    assert [len(item.rows) for item in items_of(Plan(11, 0, 0, 3, 1, 1, None, 1))] == [3, 4, 4]


def test_a_plan_of_any_length_costs_nothing():
    began = time.thread_time()
    plan = Plan(10**9, 10**9, 10**9, 1, 10**6, 1, 3, 4)
    assert plan.item(plan.last).rows == range(10**9 - 1, 10**9)
    assert time.thread_time() - began < 0.1


@pytest.mark.parametrize("order", ["strict", "fair"])
@pytest.mark.parametrize("protocol", ["split_labels", "split_u"])
def test_a_message_and_its_answer_look_their_item_up_four_times_at_most(protocol, order, tmp_path, monkeypatch):
    asked = []
    item = Plan.item
    monkeypatch.setattr(Plan, "item", lambda plan, number: asked.append(number) or item(plan, number))
    night = Night(tiny_config(("north", "south"), protocol=protocol, order=order, epochs=2), tmp_path).run()
    assert 0 < len(asked) <= 4 * sum(night.roles[SERVER].applied.values())
