"""Three nights and days in seconds: the real workers, an injected clock, one process."""

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest

from nightsplit.broker.embedded.broker import EmbeddedBroker
from nightsplit.broker.topology import site_queues
from nightsplit.server_worker.worker import ServerWorker
from nightsplit.simulation.clock import ManualClock
from nightsplit.site_worker.worker import SiteWorker
from tests.harness.approvals import approve_all
from tests.harness.workers import Hospital

BERLIN = ZoneInfo("Europe/Berlin")


class Hours(ManualClock):
    """Every look at the clock takes some minutes; while the site sleeps, the server has its day."""

    def __init__(self, start, minutes):
        super().__init__(start)
        self.minutes, self.by_day, self.days = minutes, lambda: None, []

    def now(self):
        self.advance(60 * self.minutes)
        return super().now()

    def sleep(self, seconds):
        super().sleep(seconds)
        today = self._now.astimezone(BERLIN)
        if 9 <= today.hour < 17 and today.date() not in self.days:
            self.days.append(today.date())
            self.by_day()


def one_site(folder):
    hospital = Hospital(folder, epochs=6, sites=["north"])
    run = hospital.folder / "run.toml"
    run.write_text(run.read_text().replace("window = 4", "window = 40"))
    approve_all(folder)
    return hospital


@pytest.fixture
def hospital(tmp_path):
    hospital = one_site(tmp_path / "run")
    site = hospital.folder / "north.toml"
    site.write_text(site.read_text().replace("[data]", 'shift = "22:00-06:00 Europe/Berlin"\n[data]'))
    return hospital


def test_a_worker_started_at_noon_works_its_nights_and_resumes_without_a_flag(hospital):
    clock = Hours(datetime(2026, 3, 27, 12, tzinfo=BERLIN), minutes=5)  # a night of seven hours is among them
    site = SiteWorker(hospital.folder / "north.toml", clock=clock)
    queues = site_queues("lipids", "north", site.run_config.wire.queue_bytes)
    broker = EmbeddedBroker(hospital.folder / "broker")
    busy, queued = [], []

    def observe(status):
        if status.phase.at_work:
            busy.append(clock._now.astimezone(BERLIN))

    def day():
        queued.append(broker.depth(queues.up))
        ServerWorker(hospital.folder / "server.toml").work(idle_seconds=0.5)

    site._observe = observe
    clock.by_day = day
    ServerWorker(hospital.folder / "server.toml").open_run()
    assert site.work() is True

    assert len(clock.days) >= 3
    assert queued[0] == 0  # started at noon, and nothing was sent before the evening
    assert queued[1] >= 40  # a whole window waits for the server after the first night
    assert busy
    # It looks at the clock between steps, so the last of a night may end some minutes past six.
    assert all(moment.hour >= 22 or moment.hour <= 6 for moment in busy), busy
    assert (site.model_folder / "bottom.safetensors").exists()
    assert (hospital.folder / "report" / "report.md").exists()


def test_the_hours_do_not_show_in_the_model(hospital, tmp_path):
    """The same run with everybody awake all the time ends with the same bits."""
    clock = Hours(datetime(2026, 1, 10, 12, tzinfo=UTC), minutes=5)
    clock.by_day = lambda: ServerWorker(hospital.folder / "server.toml").work(idle_seconds=0.5)
    ServerWorker(hospital.folder / "server.toml").open_run()
    assert SiteWorker(hospital.folder / "north.toml", clock=clock).work() is True

    awake = one_site(tmp_path / "awake")
    for worker in ("server", "north"):
        awake.start(worker)
    awake.wait_for_end()
    assert awake.models() == hospital.models()
