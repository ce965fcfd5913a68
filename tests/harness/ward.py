"""A night in which sites can go, and time passes."""

import json

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
    """A night in which sites can go.

    Args:
        goes: after how many messages that the broker has confirmed a site is gone for ever; 0: it never comes.
    """

    def __init__(self, config, folder, goes=None, **more):
        super().__init__(config, folder, prefetch=16, **more)
        for checkpoints in self.checkpoints.values():
            checkpoints.interval_seconds = 8 * SECONDS
        self.goes = goes or {}
        self.turns = 0
        self.told = {}
        """Errors that ended a site."""
        self.decide = lambda: Exclude(absent) if (absent := self.absent()) else None

    def absent(self):
        return self.silence.overdue(self.server.awaited(), self.server.active_sites)

    def start(self, worker):
        if worker == SERVER:
            known = self.store.statuses([SERVER]).get(SERVER)
            before = known.report.sites if known is not None else {}
            self.silence = SilenceTracker(self.config, before, lambda: self.clock.now().timestamp())
        return super().start(worker)

    def is_gone(self, worker):
        if worker not in self.goes:
            return False
        sent = self.roles[worker].next_seq - 1 if worker in self.roles else 0
        return sent >= self.goes[worker] and (worker not in self.links or not self.links[worker].unconfirmed)

    def look(self):
        self.silence.update(
            self.server.applied, self.server.awaited(), self.store.statuses(self.config.run.sites), True
        )
        lacking = self.silence.lacking(self.server.awaited(), self.server.active_sites)
        sites = {site: SiteStatus(presence=presence) for site, presence in self.silence.sites.items()}
        self.store.put_status(SERVER, WorkerStatus(phase=Phase.WORKING, lacking=tuple(lacking), sites=sites))

    def step(self, worker):
        """As a night's; but the server looks who is there first, and a site may be told to leave, or go."""
        if worker == SERVER:
            self.look()
        try:
            worked = super().step(worker)
        except RunError as error:
            self.told[worker] = error
            self.finished.add(worker)
            self.kill(worker)
            return True
        if worker in self.engines and self.is_gone(worker):
            self.kill(worker)
        return worked

    def turn(self, worker, steps=1):
        """Let a worker take some steps; time passes, in which every site that lives shows it."""
        self.turns += 1
        self.clock.advance(SECONDS)
        for site in self.config.run.sites:
            if site not in self.finished and not self.is_gone(site):
                self.store.put_status(site, WorkerStatus(phase=Phase.WORKING, beat=str(self.turns)))
        for _ in range(steps):
            if not self.is_gone(worker):
                super().turn(worker)

    @property
    def over(self):
        return all(worker in self.finished or self.is_gone(worker) for worker in self.workers)

    def run(self, turns=5000):
        """All workers in turn, until the run is over for everybody who is still there."""
        for number in range(turns):
            if self.over:
                return self
            self.turn(self.workers[number % len(self.workers)], 3)
        raise AssertionError(f"the run hangs: {self.server.applied}, {self.server.excluded}")

    def in_peace(self, folder):
        """The site that was gone is at work all the time."""
        return Ward(self.config, folder)

    def outcome(self):
        """The decisions, the figures, and all that the server and the sites that stayed end with."""
        history = json.dumps(self.server.evaluation.history, sort_keys=True)
        return dict(self.server.excluded), history, self.fingerprint(*self.goes, *self.server.excluded)


def ward_config(protocol="split_labels", bottoms="independent", window=4, order="strict", **run):
    return tiny_config(
        protocol=protocol, bottoms=bottoms, window=window, order=order, average_every=3, epochs=2, **{**QUORUM, **run}
    )


def replace_run(config, **run):
    return msgspec.structs.replace(config, run=msgspec.structs.replace(config.run, **run))


def decided(ward):
    return any(isinstance(from_journal(entry), Exclude) for entry in ward.journal())
