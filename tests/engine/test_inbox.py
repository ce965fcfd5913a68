"""Deliveries that wait for their turn: in bounded memory, and none is lost (attack A11)."""

from __future__ import annotations

import random

import pytest

from nightsplit.shared.engine import inbox
from nightsplit.shared.engine.inbox import WAITING_MAX
from tests.engine.test_engine import QUEUES, Bench

BODY = 250
"""Bytes of a message, at most."""


@pytest.fixture
def bench(tmp_path, monkeypatch) -> Bench:
    """Room for four bodies of each site, and its messages are far below `message_bytes`."""
    monkeypatch.setattr(inbox, "INBOX_BYTES", 4 * BODY)
    bench = Bench(tmp_path, prefetch=16)
    bench.engine._mailbox.message_bytes = BODY
    return bench


def kept(bench: Bench) -> int:
    """Bytes of bodies that wait for their turn."""
    return sum(len(waiting.delivery.body) for waiting in bench.engine._inbox["a"]._received.values())


@pytest.mark.parametrize("seed", range(20))
def test_every_message_is_applied_in_its_turn_whatever_the_order(bench: Bench, seed: int) -> None:
    dice = random.Random(seed)
    order = list(range(2, 40))
    dice.shuffle(order)
    order.insert(dice.choice((0, 10, len(order))), 1)
    for seq in order:
        bench.send("a", seq, 1000 + seq)
        if dice.random() < 0.3:
            bench.send("a", seq, 1000 + seq)  # a duplicate
        if dice.random() < 0.5:
            bench.turn(2)
        if dice.random() < 0.1:
            bench.die()
            bench.restart()
            bench.engine._mailbox.message_bytes = BODY
        assert kept(bench) <= 5 * BODY
    bench.turn(400)
    assert [value for site, value in bench.role.applied if site == "a"] == [1000 + seq for seq in range(1, 40)]
    assert kept(bench) == len(bench.engine._inbox["a"]) == 0
    bench.engine.leave()
    bench.die()
    bench.restart()
    bench.turn(400)
    assert [value for site, value in bench.role.applied if site == "a"] == [1000 + seq for seq in range(1, 40)]


def test_a11_a_missing_number_fills_no_memory_and_holds_up_no_other_site(bench: Bench) -> None:
    for seq in range(2, 40):
        bench.send("a", seq, 1000 + seq)
        bench.turn(2)
    assert len(bench.engine._inbox["a"]) == 38, "the prefetch grows, in case the missing one is behind them"
    assert kept(bench) <= 4 * BODY
    bench.send("b", 1, 1)
    bench.turn()
    assert bench.role.applied == [("b", 1)]
    bench.send("a", 1, 1001)
    bench.turn(400)
    assert [value for site, value in bench.role.applied if site == "a"] == [1000 + seq for seq in range(1, 40)]


def test_a11_the_prefetch_grows_no_further_than_the_queue_was_full(bench: Bench) -> None:
    """A queue never held more than that before the missing message: it was left out."""
    for seq in range(2, 600):
        bench.send("a", seq, seq)
        bench.turn(3)
    assert bench.link.prefetch <= 128
    assert bench.link.prefetch <= len(bench.engine._inbox["a"]) + 8
    assert sum(len(delivery.body) for delivery in bench.broker.peek(QUEUES["a"].up)) > 9_000, "the site has to wait"
    bench.send("b", 1, 1)
    bench.turn()
    assert bench.role.applied == [("b", 1)]


def test_the_prefetch_stays_in_its_range(tmp_path, monkeypatch) -> None:
    """AMQP has 16 bits for it; a link with a larger one ends."""
    assert 2 * WAITING_MAX < 2**16
    monkeypatch.setattr(inbox, "WAITING_MAX", 20)
    bench = Bench(tmp_path, prefetch=16)
    for seq in range(2, 60):
        bench.send("a", seq, seq)
        bench.turn(2)
    assert bench.link.prefetch == 32
