"""A finished run's exit logs are co-signed to their last message, in every system and whoever dies meanwhile."""

from __future__ import annotations

from pathlib import Path

from typing_extensions import override

from nightsplit.shared.engine.engine import Engine
from nightsplit.shared.trust.identity import Identity
from nightsplit.shared.trust.witness import cosign
from nightsplit.shared.wire.message import SERVER
from nightsplit.site_worker.trust.exit_log import ExitLog, Verified, verify
from tests.harness.night import Night, each_system, tiny_config

KEY = Identity(bytes(range(32)))


class LoggedNight(Night):
    """A run whose sites keep an exit log on disk, and whose server signs it."""

    @override
    def _build_engine(self, worker: str) -> Engine:
        engine, digest = super()._build_engine(worker), self.config.digest
        if worker == SERVER:
            self.server.cosign = lambda site, lines, head: cosign(KEY, digest, site, lines, head)
            return engine
        log = ExitLog(self.log_of(worker), digest, self.folder / "policy.toml")
        self.sites[worker].exit_log = engine._mailbox._exit_log = log
        engine.sync_records = log.sync
        return engine

    @override
    def kill(self, worker: str) -> None:
        if worker != SERVER:
            log = self.engines[worker]._mailbox._exit_log
            assert isinstance(log, ExitLog)
            log.close()
        super().kill(worker)

    def log_of(self, site: str) -> Path:
        return self.folder / site / "exit_log.jsonl"

    def verified(self, site: str) -> Verified:
        return verify(self.log_of(site), self.config.digest, site, KEY.public)


def config_of(system):
    return tiny_config(**system._asdict(), average_every=3)


@each_system
def test_each_log_is_signed_to_its_last_message(system, calm, tmp_path):
    config = config_of(system)
    nights = [LoggedNight(config, tmp_path / "calm").run()]
    nights += [LoggedNight(config, tmp_path / str(seed)).shaken(seed) for seed in range(1)]
    for night in nights:
        for site in config.run.sites:
            found = night.verified(site)
            assert found.witnessed > 0
            assert found.unsigned == 0, site
        assert night.server.unsigned == []
        assert night.fingerprint() == calm(config).fingerprint(), "the hello at the end changes no weight"


def test_a_run_waits_for_the_last_head_and_goes_on_without_a_site_that_never_tells_it(tmp_path):
    config = tiny_config(quorum=2)
    night = LoggedNight(config, tmp_path)
    for worker in night.workers:
        night.start(worker)
    north = night.sites["north"]
    north.tell_all_sent = list
    for _ in range(3000):
        for worker in [worker for worker in night.workers if worker in night.engines]:
            night.step(worker)
    assert night.server.done
    assert not night.finished
    assert night.server.awaited() == night.server.unsigned == ["north"]
    night.restart("north")  # a site says hello when it starts
    for _ in range(3000):
        for worker in [worker for worker in night.workers if worker in night.engines]:
            night.step(worker)
    assert night.over
    assert night.verified("north").unsigned == 0
