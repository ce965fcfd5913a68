"""A night on an injected clock, in which sites can go."""

import json
import random

import msgspec

from nightsplit.server_worker.presence import SilenceTracker
from nightsplit.shared.engine.order import Exclude, from_journal
from nightsplit.shared.errors import RunError
from nightsplit.shared.run_store.status import Phase, SiteStatus, WorkerStatus
from nightsplit.shared.wire.message import SERVER
from tests.harness.night import Night, tiny_config

QUORUM = {"quorum": 2, "absence_hours": 0.2}
SECONDS = 15
"""They pass with every turn of a `Ward`, so that a site is left out after 48 of them."""


class Ward(Night):
    """A night on an injected clock, in which sites can go.

    Args:
        goes: after how many messages that the broker has confirmed a site is gone for ever; 0: it never comes.
    """

    def __init__(self, config, folder, goes=None, **more):
        super().__init__(config, folder, prefetch=16, **more)
        self.goes = goes or {}
        self.turns = 0
        self.finished = set()
        self.told = {}
        """Errors that ended a site."""
        self.absent = lambda: self.silence.overdue(self.server.awaited(), self.server.active_sites)

    @property
    def server(self):
        return self.roles[SERVER]

    def start(self, name):
        if name == SERVER:
            known = self.store.statuses([SERVER]).get(SERVER)
            before = known.report.sites if known is not None else {}
            self.silence = SilenceTracker(self.config, before, lambda: SECONDS * self.turns)
        return super().start(name)

    def is_gone(self, name):
        if name not in self.goes:
            return False
        sent = self.roles[name].next_seq - 1 if name in self.roles else 0
        return sent >= self.goes[name] and (name not in self.links or not self.links[name].unconfirmed)

    def look(self):
        self.silence.update(
            self.server.applied, self.server.awaited(), self.store.statuses(self.config.run.sites), True
        )
        lacking = self.silence.lacking(self.server.awaited(), self.server.active_sites)
        sites = {site: SiteStatus(presence=presence) for site, presence in self.silence.sites.items()}
        self.store.put_status(SERVER, WorkerStatus(phase=Phase.WORKING, lacking=tuple(lacking), sites=sites))

    def turn(self, name, steps=1):
        """Let a worker take some steps; time passes, in which every site that lives shows it."""
        self.turns += 1
        for site in self.config.run.sites:
            if site not in self.finished and not self.is_gone(site):
                self.store.put_status(site, WorkerStatus(phase=Phase.WORKING, beat=str(self.turns)))
        if name in self.finished or self.is_gone(name):
            return
        if name not in self.engines:
            self.start(name).start()
        engine = self.engines[name]
        try:
            for _ in range(steps):
                if name == SERVER:
                    self.look()
                engine.step(0.0)
                if engine.finished or self.is_gone(name):
                    break
            if self.turns % 8 == 0:
                engine._save_if_due(force=True)  # as every 30 seconds
        except RunError as error:
            self.told[name] = error
            self.finished.add(name)
            self.kill(name)
            return
        if engine.finished:
            engine.leave()
            self.finished.add(name)
        if engine.finished or self.is_gone(name):
            self.kill(name)

    @property
    def over(self):
        return all(name in self.finished or self.is_gone(name) for name in (SERVER, *self.config.run.sites))

    def calmly(self, turns=5000):
        """All workers in turn, until the run is over for everybody who is still there."""
        for number in range(turns):
            if self.over:
                return self
            self.turn((SERVER, *self.config.run.sites)[number % (1 + len(self.config.run.sites))], 3)
        raise AssertionError(f"the run hangs: {self.server.applied}, {self.server.excluded}")

    def shaken(self, seed):
        """Workers die at random."""
        dice = random.Random(seed)
        for _ in range(4_000):
            if self.over:
                return self
            name = dice.choice([SERVER, *self.config.run.sites])
            self.turn(name, dice.randint(1, 12))
            if name in self.engines and dice.random() < 0.15:
                self.kill(name)
        raise AssertionError(f"the run hangs: {self.server.applied}, {self.server.excluded}")

    def journal(self):
        entries = []
        while (entry := self.store.journalled(len(entries) + 1)) is not None:
            entries.append(entry)
        return entries

    def outcome(self):
        """The decisions, the figures, and all that the server and the sites that stayed end with."""
        history = json.dumps(self.server.evaluation.history, sort_keys=True)
        return dict(self.server.excluded), history, self.fingerprint(*self.goes)


def ward_config(protocol="split_labels", bottoms="independent", window=4, order="strict", **run):
    return tiny_config(
        protocol=protocol, bottoms=bottoms, window=window, order=order, average_every=3, epochs=2, **{**QUORUM, **run}
    )


def replace_run(config, **run):
    return msgspec.structs.replace(config, run=msgspec.structs.replace(config.run, **run))


def decided(ward):
    return any(isinstance(from_journal(entry), Exclude) for entry in ward.journal())


def replayed(ward, folder):
    """The run once more, from its journal, with the site that was gone at work all the time."""
    again = Ward(ward.config, folder)
    for position, entry in enumerate(ward.journal(), 1):
        again.store.journal(position, entry)
    again.absent = lambda: None  # what it needs is written down
    again.calmly()
    again.goes = ward.goes  # for the comparison
    return again
