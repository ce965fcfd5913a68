"""Before each act of a role a second one is restored from its checkpoint: both say the same, and stand at one point.

Whole runs of every system, in memory, as they should be and with every fourth message refused.
"""

import random
from functools import partial

import pytest

from nightsplit.shared.errors import Refused
from nightsplit.shared.wire.message import SERVER, UNSEQUENCED, Kind
from tests.harness.dialogue import Dialogue, assert_unchanged, copied
from tests.harness.effects import exact
from tests.harness.night import each_system, tiny_config

READ = {*UNSEQUENCED, Kind.FINISH}
"""Kinds that are never refused here: without its farewell, a site of rounds does not end."""


class Twice:
    """A role that does everything a second time, in a fresh process from a checkpoint."""

    def __init__(self, role, fresh, refuse):
        self.role, self.fresh, self.refuse = role, fresh, refuse
        self.dice = random.Random(role.name)

    def __getattr__(self, name):
        return getattr(self.role, name)

    def twice(self, act, waiting=False):
        before = copied(self.role.snapshot(None))
        effects = act(self.role)
        if effects or not waiting:
            twin = self.fresh()
            twin.restore(before)
            assert exact(act(twin)) == exact(effects)
            assert_unchanged(copied(self.role.snapshot(None)), twin.snapshot(None), effects)
        return effects

    def next(self):
        return self.twice(lambda role: role.next(), waiting=True)

    def on(self, message):
        if message.header.kind not in READ and self.dice.random() < self.refuse:
            raise Refused(306, "it was short.", "send it whole.")
        return self.twice(lambda role: role.on(message))

    def refused(self, header, refusal):
        return self.twice(lambda role: role.refused(header, refusal))


@pytest.mark.parametrize("refuse", [0.0, 0.25])
@each_system
def test_a_role_may_begin_anew_anywhere(system, refuse):
    averaged = {"average_every": system.window} if system.bottoms == "averaged" else {}
    config = tiny_config(("south", "east"), **system._asdict(), epochs=2, batch_size=12, **averaged)
    talk = Dialogue(config)
    for name, role in talk.roles.items():
        talk.roles[name] = Twice(role, partial(talk.make, name), refuse)
    for _ in talk.walk():
        pass
    assert talk.finished == set(talk.roles)
    assert (talk.roles[SERVER].refusals.total() > 0) is (refuse > 0)
