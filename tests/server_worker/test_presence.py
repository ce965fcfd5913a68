"""Whose clock decides that a site has fallen silent, and what counts as silence."""

from datetime import UTC, datetime

import pytest

from nightsplit.server_worker.presence import UPDATE_INTERVAL_S_MAX, SilenceTracker
from nightsplit.shared.run_store.base import Status
from nightsplit.shared.run_store.status import Phase, SiteStatus, WorkerStatus
from tests.harness.night import tiny_config


class Watch:
    """A silence tracker of two sites with its clock in the test's hands; north is the one that is waited for."""

    def __init__(self, before=None, hours=1.0, beat="a"):
        config = tiny_config(("north", "south"), quorum=1, absence_hours=hours)
        self.now, self.beat, self.applied = 1000.0, beat, {"north": 0, "south": 0}
        self.silence = SilenceTracker(
            config, before or {}, lambda: self.now, lambda: datetime(2026, 11, 21, tzinfo=UTC)
        )
        self.pass_time(0)

    def pass_time(self, seconds, listening=True, step=30.0, awaited=("north",)):
        until = self.now + seconds
        while True:
            self.now = min(until, self.now + step)
            report = WorkerStatus(phase=Phase.WORKING, beat=self.beat)
            statuses = {"north": Status("north", report, age_seconds=86_400.0)}
            self.silence.update(self.applied, awaited, statuses, listening)
            if self.now >= until:
                break

    @property
    def overdue(self):
        return self.silence.overdue(["north"], ["north", "south"])

    def told(self):
        return {site: SiteStatus(presence=presence) for site, presence in self.silence.sites.items()}


def test_silence_is_what_the_server_itself_has_listened_to():
    watch = Watch()
    watch.pass_time(3590)
    assert watch.overdue is None
    watch.pass_time(20)
    assert watch.overdue == "north"


@pytest.mark.parametrize("sign", ["heartbeat", "message"])
def test_a_sign_of_life_ends_the_silence(sign):
    """A heartbeat is new when it differs: whatever the site's clock says, a day early or late."""
    watch = Watch(beat="2026-11-20T12:00")
    watch.pass_time(3500)
    if sign == "heartbeat":
        watch.beat = "2026-11-19T12:00"
    else:
        watch.applied = {"north": 1, "south": 0}
    watch.pass_time(3500)
    assert watch.overdue is None
    assert watch.silence.last_seen["north"] == datetime(2026, 11, 21, tzinfo=UTC)
    watch.pass_time(200)
    assert watch.overdue == "north"


def test_hours_without_broker_or_store_do_not_count():
    watch = Watch()
    watch.pass_time(50_000, listening=False)
    assert watch.overdue is None


def test_hours_in_which_the_run_waits_for_others_do_not_count():
    watch = Watch()
    watch.pass_time(50_000, awaited=("south",))
    assert watch.overdue is None


def test_a_server_that_slept_has_not_listened():
    watch = Watch()
    watch.pass_time(86_400, step=86_400)
    assert watch.overdue is None
    watch.pass_time(3600 - UPDATE_INTERVAL_S_MAX)
    assert watch.overdue == "north"


def test_a_clock_that_goes_backwards_decides_nothing():
    watch = Watch()
    watch.pass_time(3500)
    for _ in range(100):
        watch.now -= 86_400
        watch.pass_time(0)
    assert watch.overdue is None
    watch.pass_time(110)
    assert watch.overdue == "north"


def test_the_next_server_goes_on_where_the_last_one_left_off():
    before = Watch()
    before.pass_time(2000)
    after = Watch(before.told())
    after.pass_time(1500)
    assert after.overdue is None
    after.pass_time(120)
    assert after.overdue == "north"


def test_a_site_that_lived_while_the_server_was_away_is_heard():
    before = Watch(beat="a")
    before.pass_time(3000)
    after = Watch(before.told(), beat="b")
    after.pass_time(3500)
    assert after.overdue is None


def test_a_new_server_listens_itself_before_it_decides():
    """What the site has sent in the meantime may still be on its way from the broker."""
    before = Watch()
    before.pass_time(5000)
    after = Watch(before.told())
    after.pass_time(300)
    assert after.overdue is None
    after.pass_time(330)
    assert after.overdue == "north"
