"""Sites that are late, slow or gone: the run ends, and every restart, successor and replay makes the same decision."""

import json
import random
import time
from datetime import datetime

import msgspec
import pytest

from console.status import _sentence
from server_worker.attendance import Attendance
from server_worker.report import write_report
from shared.errors import RunError
from shared.message import SERVER
from shared.protocols.plan import Step
from shared.store import Status
from shared.turns import LEAVES, Turns
from tests.protocols.night import SYSTEMS, Night, tiny_config
from tests.workers import Hospital

QUORUM = {"quorum": 2, "absence_hours": 0.2}
SECONDS = 15
"""They pass with every turn of a `Ward`, so that a site is left out after 48 of them."""
MOMENTS = {
    "split_labels": (0, 1, 3, 5, 9), "split_u": (0, 3, 6, 13, 19), "split_frozen": (0, 1, 4),
    "fedavg_transfer": (1, 3, 12), "fedavg_dp_seg": (0, 2), "data_vectors": (0, 3),
}  # fmt: skip
"""After how many of its messages the site goes: before its first, before an averaging, in the second epoch, at last;
between two slices of an update, behind one."""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No host dies here, so nothing has to be forced to disk."""
    monkeypatch.setattr("os.fsync", lambda handle: None)


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
        self.absent = lambda: self.attendance.absent(self.server.awaited(), self.server.staying)

    @property
    def server(self):
        return self.roles[SERVER]

    def start(self, name):
        if name == SERVER:
            self.attendance = Attendance(
                self.config, self.store.statuses([SERVER, *self.config.run.sites]), lambda: SECONDS * self.turns
            )
        return super().start(name)

    def is_gone(self, name):
        if name not in self.goes:
            return False
        sent = self.roles[name].next_seq - 1 if name in self.roles else 0
        return sent >= self.goes[name] and (name not in self.links or not self.links[name].unconfirmed)

    def look(self):
        self.attendance.look(
            self.server.applied, self.server.awaited(), self.store.statuses(self.config.run.sites), True
        )
        self.store.put_status(SERVER, self.attendance.facts(self.server.awaited(), self.server.staying))

    def turn(self, name, steps=1):
        """Let a worker take some steps; time passes, in which every site that lives shows it."""
        self.turns += 1
        for site in self.config.run.sites:
            if site not in self.finished and not self.is_gone(site):
                self.store.put_status(site, {"beat": self.turns})
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
        raise AssertionError(f"the run hangs: {self.server.applied}, {self.server.left_out}")

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
        raise AssertionError(f"the run hangs: {self.server.applied}, {self.server.left_out}")

    def journal(self):
        entries = []
        while (entry := self.store.journalled(len(entries) + 1)) is not None:
            entries.append(entry)
        return entries

    def outcome(self):
        """The decisions, the figures, and all that the server and the sites that stayed end with."""
        history = json.dumps(self.server.evaluation.history, sort_keys=True)
        return dict(self.server.left_out), history, self.fingerprint(*self.goes)


def ward_config(protocol="split_labels", bottoms="independent", window=4, order="strict", **run):
    return tiny_config(
        protocol=protocol, bottoms=bottoms, window=window, order=order, average_every=3, epochs=2, **{**QUORUM, **run}
    )


def replayed(ward, folder):
    """The run once more, from its journal, with the site that was gone at work all the time."""
    again = Ward(ward.config, folder)
    for position, entry in enumerate(ward.journal(), 1):
        again.store.journal(position, entry)
    again.absent = lambda: None  # what it needs is written down
    again.calmly()
    again.goes = ward.goes  # for the comparison
    return again


# -- one that leaves for ever --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("protocol", "bottoms", "window", "sent"), [(*system, sent) for system in SYSTEMS for sent in MOMENTS[system[0]]]
)
def test_a_strict_run_ends_without_a_site_whatever_dies(protocol, bottoms, window, sent, tmp_path):
    config = ward_config(protocol, bottoms, window)
    calm = Ward(config, tmp_path / "calm", {"south": sent}).calmly()
    assert list(calm.server.left_out) == ["south"]
    assert [entry for entry in calm.journal() if entry.startswith(LEAVES)] == ["-south"]
    assert calm.server.applied["south"] == sent, "what it gave before stays"
    assert calm.server.done
    shaken = Ward(config, tmp_path / "shaken", {"south": sent}).shaken(seed=sent)
    assert shaken.outcome() == calm.outcome()
    assert replayed(shaken, tmp_path / "replay").outcome() == calm.outcome()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("protocol", "bottoms", "window"), SYSTEMS)
def test_a_fair_run_ends_like_the_replay_of_its_journal(protocol, bottoms, window, seed, tmp_path):
    config = ward_config(protocol, bottoms, window, order="fair")
    shaken = Ward(config, tmp_path / "shaken", {"south": 3}).shaken(seed)
    assert list(shaken.server.left_out) == ["south"]
    assert replayed(shaken, tmp_path / "replay").outcome() == shaken.outcome()


def test_two_sites_may_go_one_after_the_other(tmp_path):
    config = ward_config(quorum=1)
    ward = Ward(config, tmp_path / "calm", {"south": 3, "east": 5}).calmly()
    assert sorted(ward.server.left_out) == ["east", "south"]
    assert Ward(config, tmp_path / "shaken", {"south": 3, "east": 5}).shaken(1).outcome() == ward.outcome()


def test_a_site_that_has_given_everything_may_go(tmp_path):
    """Frozen: it releases its activations and is never seen again. That is its contract, and no absence."""
    config = ward_config("split_frozen")
    ward = Ward(config, tmp_path, {"south": 5})  # 3 batches to train on, one to choose by, one to test
    assert ward.calmly().server.left_out == {}
    assert ward.server.applied["south"] == ward.server.sequences["south"].last == 5


@pytest.mark.parametrize("order", ["strict", "fair"])
def test_a_frozen_run_trains_on_what_was_stored(order, tmp_path):
    ward = Ward(ward_config("split_frozen", order=order), tmp_path, {"south": 2}).calmly()
    rows = sum(len(ward.server.sequences["south"].plan.rows(q)) for q in (1, 2))
    assert ward.server.samples["south"] == rows > 0
    assert ward.server.share("south") == rows / (rows + 40 + 12)
    assert all(set(entry["sites"]) == {"north", "east"} for entry in ward.server.evaluation.history)
    assert len(ward.server.evaluation.history) == ward.config.run.epochs


@pytest.mark.parametrize("order", ["strict", "fair"])
def test_epochs_are_judged_without_it(order, tmp_path):
    """Its figures stay in the epoch that it finished, and are absent later."""
    config = replace_run(ward_config(order=order), epochs=4)
    plan_of_one_epoch = 3 + 1 + 1  # batches of south: training, validation, test
    ward = Ward(config, tmp_path, {"south": plan_of_one_epoch + 1}).calmly()
    judged = {entry["epoch"]: set(entry["sites"]) for entry in ward.server.evaluation.history}
    everybody = {"north", "south", "east"}
    assert judged == {1: everybody, **dict.fromkeys((2, 3, 4), everybody - {"south"})}


def replace_run(config, **run):
    return msgspec.structs.replace(config, run=msgspec.structs.replace(config.run, **run))


def test_the_best_weights_is_the_one_that_was_evaluated(tmp_path):
    """In fair order others run ahead; an epoch that is judged late must not get the weights of today."""
    config = replace_run(ward_config(order="fair"), epochs=6)
    ward = Ward(config, tmp_path, {"south": 2})
    kept = {}
    while not ward.over:
        for name in (SERVER, "north", "east", "south"):
            ward.turn(name, 3)
            for epoch, top in ward.server._tops.items():
                kept[epoch] = top
    best = ward.server.evaluation.best
    assert set(kept) == {1, 2, 3, 4, 5, 6}, "all epochs waited for the site"
    assert best < 6, "choose other data: the last epoch cannot show the difference"
    assert all(ward.server.best_weights[name].equal(tensor) for name, tensor in kept[best].items())
    assert not all(ward.server.best_weights[name].equal(tensor) for name, tensor in kept[6].items())


# -- crashes around the decision -----------------------------------------------------------------------


class Killed(Exception):
    """Stands for SIGKILL at an exact place."""


def decided(ward):
    return any(entry.startswith(LEAVES) for entry in ward.journal())


@pytest.mark.parametrize(("protocol", "bottoms", "window"), SYSTEMS)
def test_the_server_may_die_between_any_two_steps_around_the_decision(protocol, bottoms, window, tmp_path):
    config, goes = ward_config(protocol, bottoms, window), {"south": 3}
    calm = Ward(config, tmp_path / "calm", goes)
    names, steps = (SERVER, *config.run.sites), 0
    while not decided(calm):
        calm.turn(names[steps % 4])
        steps += 1
    calm.calmly()
    for offset in range(-1, 4):
        ward = Ward(config, tmp_path / f"killed{offset}", goes)
        for number in range(steps + 40):
            if number == steps - 1 + 4 * offset and SERVER in ward.engines:
                ward.kill(SERVER)
            ward.turn(names[number % 4])
        assert ward.calmly().outcome() == calm.outcome(), f"killed {offset} steps of the server from the decision"
        assert ward.journal().count("-south") == 1


def test_silence_goes_on_where_the_last_server_left_off(tmp_path):
    """None of them lives for as long as absence_hours."""
    ward = Ward(ward_config(), tmp_path, {"south": 3})
    for number in range(600):
        if number % 36 == 0 and SERVER in ward.engines:
            ward.kill(SERVER)
        ward.turn((*ward.config.run.sites, SERVER)[number % 4], 3)
    assert QUORUM["absence_hours"] * 3600 > 36 * SECONDS
    assert list(ward.server.left_out) == ["south"]


@pytest.mark.parametrize("place", ["before the record", "behind the record", "publish 0", "publish 1", "publish 2"])
@pytest.mark.parametrize("bottoms", ["independent", "averaged"])
def test_the_server_may_die_within_the_decision(place, bottoms, tmp_path):
    """An effect of the decision left, or half of them, or none: the successor comes to the same end."""
    config, goes = ward_config(bottoms=bottoms, window=3, evaluate_every=2), {"south": 5}
    calm = Ward(config, tmp_path / "calm", goes).calmly()
    ward = Ward(config, tmp_path / "killed", goes)
    journal, state = ward.store.journal, {"armed": True}

    def dying(position, sender):
        if not (sender.startswith(LEAVES) and state.pop("armed", False)):
            return journal(position, sender)
        if place == "before the record":
            raise Killed
        entry = journal(position, sender)
        if place == "behind the record":
            raise Killed
        left = int(place.split()[1])
        link, publish = ward.links[SERVER], ward.links[SERVER].publish

        def counted(*args):
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            publish(*args)

        link.publish = counted
        return entry

    ward.store.journal = dying
    killed = 0
    for number in range(5000):
        if ward.over:
            break
        try:
            ward.turn((SERVER, *config.run.sites)[number % 4], 3)
        except Killed:
            killed += 1
            ward.kill(SERVER)
            ward.store.put_status(SERVER, {})  # a successor that knows nothing of the silence
    assert killed == 1
    assert ward.outcome() == calm.outcome()
    assert ward.journal().count("-south") == 1


class Chooser:
    journalled = True

    def choose(self, ready):
        return min(ready, default=None)


@pytest.mark.parametrize(
    ("first", "second"), [("north", "-north"), ("-north", "north")], ids=["applied first", "left out first"]
)
def test_two_servers_make_one_decision(first, second, tmp_path):
    """One has the site's message in its hands, the other finds the site absent: who writes first is followed."""
    night = Night(tiny_config(), tmp_path)
    store = night.store
    zombie = Turns(Chooser(), store, lambda: LEAVES + "north")
    successor = Turns(Chooser(), store, lambda: LEAVES + "north")
    sees = {"north": {"north"}, "-north": set()}
    assert zombie.choose(1, sees[first]) == first
    if second == "north":
        assert successor.choose(1, {"north"}) == "-north"
    else:
        assert successor.choose(1, set()) is None, "it waits for the message that the other one has applied"
        assert successor.choose(1, {"north"}) == "north"
    assert store.journalled(1) == first


# -- late return -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["strict", "fair"])
def test_a_site_that_comes_back_is_told_and_changes_nothing(order, tmp_path):
    config = ward_config(order=order)
    ward = Ward(config, tmp_path / "returns", {"south": 5})
    while not decided(ward):
        ward.turn((SERVER, *config.run.sites)[ward.turns % 4])
    applied = ward.server.applied["south"]
    ward.goes = {}
    for number in range(5000):
        if ward.over:
            break
        ward.turn((SERVER, *config.run.sites)[number % 4])
    error = ward.told["south"]
    assert error.number == 608
    assert "silent for 0.2 h" in str(error)
    assert ward.server.applied["south"] == applied
    ward.goes = {"south": 5}
    if order == "strict":
        assert ward.outcome() == Ward(config, tmp_path / "gone", {"south": 5}).calmly().outcome()
    assert ward.broker.depth(ward.queues["south"].up) == 0, "its late messages are acknowledged"


def test_a_site_that_comes_back_when_all_is_over_is_told(tmp_path):
    ward = Ward(ward_config(), tmp_path, {"south": 5}).calmly()
    ward.goes = {}
    for _ in range(3):  # however often it is started again
        ward.finished.discard("south")
        for _ in range(50):
            ward.turn("south")
        assert ward.told.pop("south").number == 608


# -- those who suffice, and those who are slow -----------------------------------------------------------


def test_without_its_quorum_the_run_waits_and_says_for_whom(tmp_path):
    ward = Ward(ward_config(order="fair"), tmp_path, {"south": 0, "east": 0})
    for number in range(400):
        ward.turn((SERVER, *ward.config.run.sites)[number % 4])
    assert ward.server.left_out == {}
    assert ward.store.statuses([SERVER])[SERVER].facts["lacking"] == "south, east"
    ward.goes = {"south": 0}  # east comes, so two of three are there
    ward.calmly()
    assert list(ward.server.left_out) == ["south"]
    assert ward.store.statuses([SERVER])[SERVER].facts["lacking"] is None


@pytest.mark.parametrize("order", ["strict", "fair"])
def test_without_a_quorum_rule_nobody_is_left_out(order, tmp_path):
    ward = Ward(replace_run(ward_config(order=order), quorum=None), tmp_path, {"south": 3})
    for number in range(400):
        ward.turn((SERVER, *ward.config.run.sites)[number % 4])
    assert ward.server.left_out == {}
    assert SERVER not in ward.finished
    assert ward.store.statuses([SERVER])[SERVER].facts["lacking"] == "south"


def slow_run(ward):
    """One site makes a step where the others make twenty; applied messages per site when the first others are done."""
    first_done = None
    for number in range(20_000):
        if ward.over:
            return first_done
        for name in (SERVER, "north", "east", *(["south"] if number % 20 == 0 else [])):
            ward.turn(name)
        applied, plans = ward.server.applied, ward.server.sequences
        if first_done is None and all(s in plans and applied[s] == plans[s].last for s in ("north", "east")):
            first_done = dict(applied)
    raise AssertionError(f"the run hangs: {ward.server.applied}")


def staleness(ward, site):
    return max(line.metrics["staleness"] for line in ward.lines if line.metrics.get("site") == site and
               line.metrics["event"] == "train")  # fmt: skip


def test_in_fair_order_a_slow_site_holds_nobody_back(tmp_path):
    config = ward_config(order="fair", absence_hours=2.0)
    ward = Ward(config, tmp_path)
    then = slow_run(ward)
    assert ward.server.left_out == {}, "slow is not silent"
    assert then["south"] < ward.server.sequences["south"].last / 2, "the others were done long before"
    assert ward.server.applied["south"] == ward.server.sequences["south"].last
    # A batch is used when at most a window of each other site came between.
    window, others = config.run.window, len(config.run.sites) - 1
    assert max(staleness(ward, "north"), staleness(ward, "east")) <= (others + 1) * (window + 1)


def test_in_strict_order_all_wait_for_a_slow_site_and_nothing_changes(tmp_path):
    config = ward_config(absence_hours=2.0)
    ward = Ward(config, tmp_path / "slow")
    then = slow_run(ward)
    assert ward.server.left_out == {}
    assert then["south"] >= ward.server.sequences["south"].last - 2, "they came to the end together"
    assert ward.outcome() == Ward(config, tmp_path / "calm").calmly().outcome()


# -- what people are told ---------------------------------------------------------------------------------


def test_the_report_names_everybodys_part(tmp_path):
    ward = Ward(ward_config(), tmp_path / "night", {"south": 8}).calmly()
    report = write_report(tmp_path / "report", ward.config, ward.server, ward.attendance.heard)
    sites, plan = report["sites"], ward.server.sequences["south"].plan
    trained = [q for q in range(1, 9) if plan.item(q).step is Step.TRAIN]
    assert sites["south"]["batches"] == len(trained)
    assert sites["south"]["samples"] == sum(len(plan.rows(q)) for q in trained)
    assert sum(facts["batches"] for facts in sites.values()) == report["steps"]
    assert sum(facts["share"] for facts in sites.values()) == pytest.approx(1)
    assert sites["south"]["left_out_at"] == ward.journal().index("-south")
    assert sites["north"]["left_out_at"] is None
    assert datetime.fromisoformat(sites["south"]["last_heard"]).utcoffset().total_seconds() == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert f"**LEFT OUT: south, behind {sites['south']['left_out_at']} applied messages" in text
    assert "silent for 0.2 h and 2 sites suffice" in text
    assert text.count("LEFT OUT") == 2  # the sentence, and its line in the table


def test_a_crash_does_not_change_what_a_site_gave(tmp_path):
    config = ward_config("split_u")
    calm = Ward(config, tmp_path / "calm", {"south": 8}).calmly()
    shaken = Ward(config, tmp_path / "shaken", {"south": 8}).shaken(3)
    given = [[ward.server.contribution(site) for site in config.run.sites] for ward in (calm, shaken)]
    assert given[0] == given[1]


def test_status_says_for_whom_the_run_waits():
    facts = {"state": "working", "applied": 5, "lacking": "south, east"}
    assert _sentence(Status(SERVER, facts, 1.0), 0).endswith(
        "; WAITS for south, east: silent for too long, but without them the quorum is not met"
    )
    assert "WAITS" not in _sentence(Status(SERVER, {**facts, "lacking": None}, 1.0), 0)


# -- real processes ----------------------------------------------------------------------------------------


@pytest.mark.timeout(400)
def test_real_workers_go_on_without_one_that_was_killed(tmp_path):
    """Some seconds stand for the hours; the server is killed, too, while it waits."""
    hospital = Hospital(tmp_path / "lipids", epochs=6)
    run = hospital.folder / "run.toml"
    run.write_text(run.read_text().replace("[run]", "[run]\nquorum = 2\nabsence_hours = 0.005"))

    def states():
        answer = hospital.call("status", "server.toml", "--json")
        return {line["worker"]: line for line in json.loads(answer.stdout)["workers"]}

    try:
        assert hospital.call("open", "server.toml").returncode == 0
        for site in ("north", "south", "east"):
            hospital.start(site)
        while not all(line["online"] for site, line in states().items() if site != SERVER):
            time.sleep(0.5)  # nobody may be absent because it is slow to start
        hospital.start(SERVER)
        hospital.wait_for_steps(10, seconds=120)
        hospital.kill("east")
        time.sleep(1)
        hospital.kill(SERVER)
        hospital.start(SERVER)
        del hospital.processes["east"]
        hospital.wait_for_end(seconds=200)
        east = hospital.call("site", "east.toml")
        line = states()["east"]
    finally:
        hospital.close()
    report = json.loads((hospital.folder / "report" / "report.json").read_text())
    behind = report["sites"]["east"]["left_out_at"]
    assert 10 <= behind < report["sites"]["north"]["planned"]
    assert report["sites"]["east"]["batches"] > 0
    assert set(report["history"][-1]["sites"]) == {"north", "south"}
    assert east.returncode == 1
    assert east.stderr.startswith("E608 Site was left out: the server rejects east: ")
    assert line["state"].startswith(f"LEFT OUT after {behind} messages")
    assert line["batches"] == report["sites"]["east"]["batches"]
