"""Strict is a fixed function; fair keeps sites in step with their plans."""

import random

from nightsplit.server_worker.stream.schedule import Fair, Strict
from nightsplit.shared.protocols.plan import Plan
from nightsplit.shared.protocols.stream import StreamSequence

SIZES = {"large": 60, "middle": 30, "small": 6}
PLANS = {site: StreamSequence(Plan(n, n // 3, n // 3, 3, 4, 1, None, 2), has_head=False) for site, n in SIZES.items()}


def order_of(schedule, ready_at):
    """Who is applied in which order, when `ready_at(step)` says which sites have something there."""
    applied, order, step = dict.fromkeys(PLANS, 0), [], 0
    while any(applied[site] < PLANS[site].last for site in PLANS):
        step += 1
        ready = {site for site in ready_at(step) if applied[site] < PLANS[site].last}
        site = schedule.choose(ready, set(), PLANS, applied)
        if site is not None:
            applied[site] += 1
            order.append(site)
    return order


def test_strict_does_not_depend_on_what_arrived():
    dice = random.Random(0)
    calm = order_of(Strict(list(SIZES)), lambda step: set(SIZES))
    erratic = order_of(Strict(list(SIZES)), lambda step: {s for s in SIZES if dice.random() < 0.4})
    assert erratic == calm


def test_strict_evaluates_when_all_have_trained():
    order = order_of(Strict(list(SIZES)), lambda step: set(SIZES))
    counts, phases = dict.fromkeys(SIZES, 0), []
    for site in order:
        counts[site] += 1
        item = PLANS[site].plan.item(counts[site])
        phases.append((item.epoch, item.evaluates))
    assert phases == sorted(phases)


def test_strict_waits_for_an_unknown_site():
    plans = {site: plan for site, plan in PLANS.items() if site != "small"}
    assert Strict(list(SIZES)).choose({"large", "middle"}, set(), plans, dict.fromkeys(SIZES, 0)) is None


def test_fair_keeps_shares_at_their_weights():
    total = sum(plan.last for plan in PLANS.values())
    order = order_of(Fair(list(SIZES)), lambda step: set(SIZES))
    for done in range(20, total, 10):
        for site, plan in PLANS.items():
            assert abs(order[:done].count(site) / done - plan.last / total) < 0.1


def test_fair_does_not_wait_and_prefers_who_is_behind():
    fair, applied = Fair(list(SIZES)), {"large": 30, "middle": 0, "small": 4}
    assert fair.choose({"large"}, set(), PLANS, applied) == "large"
    assert fair.choose({"large", "middle"}, set(), PLANS, applied) == "middle"
    assert fair.choose({"large", "middle"}, {"middle"}, PLANS, applied) == "large"
    assert fair.choose(set(), set(), PLANS, applied) is None


def test_nothing_is_chosen_beyond_a_plan():
    applied = {site: plan.last for site, plan in PLANS.items()}
    for schedule in (Strict(list(SIZES)), Fair(list(SIZES))):
        assert schedule.choose(set(SIZES), set(), PLANS, applied) is None
