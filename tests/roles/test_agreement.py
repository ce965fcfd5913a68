"""How site and server agree on a run, in every system: hello, manifest, rejection; and how a site is excluded."""

import pytest

from nightsplit.server_worker.greeting import RECEIPTS_MAX
from nightsplit.server_worker.greeting import REPEATS_MAX as ANSWERS_MAX
from nightsplit.shared.engine.effects import Again, Cosigned, Expect, Release, Send
from nightsplit.shared.errors import RunError
from nightsplit.shared.protocols.spec import TRAINING, systems
from nightsplit.shared.wire.message import SERVER, Kind
from nightsplit.site_worker.role import REMINDERS_MAX, REPEATS_MAX
from tests.harness.effects import (
    exact,
    from_server,
    greeting,
    hello,
    manifest,
    receipt,
    refusal_of,
    restored,
    seen,
    sent,
)
from tests.harness.night import tiny_config
from tests.harness.pure_roles import pure_server, pure_site

SITES = ("south", "east")

pytestmark = pytest.mark.parametrize("protocol", systems(*TRAINING))


@pytest.fixture
def config(protocol):
    return tiny_config(SITES, protocol=protocol, order="fair", quorum=1)


@pytest.fixture
def site(config):
    return pure_site(config, "east")


@pytest.fixture
def server(config):
    return pure_server(config)


def opening(config, site):
    return sent(site, Kind.MANIFEST, 0, config=config.canonical(), contract=config.digest)


def rejection(site, incarnation, number, reason):
    return sent(site, Kind.REJECTED, 0, incarnation=incarnation, number=number, reason=reason)


# ── the site ────────────────────────────────────────────────────────────────────────────────────


def test_a_site_counts_its_patients_for_nobody_before_it_knows_the_run(config, site):
    unknown = greeting(config, "east", enrolled=False, train=0, validation=0, test=0)
    assert seen(site.start()) == [sent(SERVER, Kind.HELLO, 0, **unknown)]
    assert site.next() == []
    assert seen(site.on(manifest(config))) == [sent(SERVER, Kind.HELLO, 0, **greeting(config, "east"))]
    assert site.on(manifest(config)) == []


def test_a_site_sends_nothing_into_another_run(config, protocol, site):
    site.start()
    other = tiny_config(SITES, protocol=protocol, order="strict", quorum=1)
    with pytest.raises(RunError, match=r"run\.order") as stopped:
        site.on(manifest(other))
    assert stopped.value.number == 601
    assert site.next() == []
    assert site.at_work is False


def test_a_site_obeys_a_rejection_of_itself_alone(site):
    assert site.on(from_server(Kind.REJECTED, 0, incarnation="east-0", number=409, reason="an earlier one")) == []
    assert site.on(from_server(Kind.REJECTED, 0, incarnation="", number=409, reason="one for all")) == []
    with pytest.raises(RunError, match="rejects east: too late") as stopped:
        site.on(from_server(Kind.REJECTED, 0, incarnation="east-1", number=409, reason="too late"))
    assert stopped.value.number == 409
    assert refusal_of(site, from_server(Kind.REJECTED, 0, incarnation="east-1", number=7, reason="?")).number == 304
    with pytest.raises(RunError, match="rejects east: it was silent") as stopped:
        site.on(from_server(Kind.EXCLUDED, 0, reason="it was silent"))
    assert stopped.value.number == 608


def test_a_site_that_agreed_agrees_in_its_next_process(config, site):
    site.start()
    site.on(manifest(config))
    again = restored(site, pure_site(config, "east", 2))
    assert seen(again.start()) == [sent(SERVER, Kind.HELLO, 0, **greeting(config, "east", incarnation="east-2"))]
    assert again.on(manifest(config)) == []
    assert again.next() != []


def test_a_checkpoint_without_answers_is_told_to_nobody(config, site):
    site.on(manifest(config))
    site.snapshot(None)
    assert site.saved() == []


# ── the server ──────────────────────────────────────────────────────────────────────────────────


def test_a_server_opens_a_run_once(config, server):
    assert seen(server.start()) == [opening(config, site) for site in SITES]
    assert server.start() == []
    assert restored(server, pure_server(config)).start() == []


def test_a_server_shows_the_run_to_whoever_does_not_know_it(config, server):
    stranger = hello(config, "east", enrolled=False, train=0, validation=0, test=0)
    assert seen(server.on(stranger)) == [opening(config, "east")]
    assert "east" not in server.sequences


def test_a_server_chooses_nobody_whose_hello_has_not_come(config, server):
    assert server.choose({"east"}) is None
    for _ in range(2):
        assert seen(server.on(hello(config, "east"))) == [receipt("east"), Expect("east", 0)]
        assert server.choose({"east", "south"}) == "east"


@pytest.mark.parametrize(
    ("changed", "number", "reason"),
    [
        ({"contract": "other"}, 601, "the site's run.toml differs from the server's"),
        ({"train": 0}, 405, "the site has nothing to train on"),
    ],
)
def test_a_server_rejects_who_cannot_take_part(config, server, changed, number, reason):
    assert seen(server.on(hello(config, "east", **changed))) == [rejection("east", "east-1", number, reason)]
    assert server.choose({"east"}) is None


def test_a_server_rejects_a_site_whose_patients_or_memory_changed(config, server):
    server.on(hello(config, "east", mark=1, released=1))
    for role in (server, restored(server, pure_server(config))):
        changed = role.on(hello(config, "east", test=5, mark=1, released=1))
        assert seen(changed) == [rejection("east", "east-1", 409, "the site's data changed since the run began")]
        lost = role.on(hello(config, "east", incarnation="east-2"))
        stands = "the site is at answer 0, but had stored 1 before"
        assert seen(lost) == [rejection("east", "east-2", 504, stands)]
        accepted = seen(role.on(hello(config, "east")))
        assert accepted == [receipt("east"), Expect("east", 0)], "a copy of an old hello says nothing about a loss"


def test_a_hello_that_cannot_be_true_is_refused(config, server):
    refusal = refusal_of(server, hello(config, "east", mark=1, released=2))
    assert (refusal.number, "answer 1, 2 of them stored" in refusal.sentence) == (304, True)


def test_a_site_that_is_excluded_is_told_now_and_whenever_it_comes(config, server):
    silence = "it was silent for 72 h, and the run went on without it"
    for site in ("east", "south"):
        server.on(hello(config, site))
    [told] = server.exclude("south")
    assert (told.receiver, told.kind, told.scalars) == ("south", Kind.EXCLUDED, {"reason": silence})
    assert pure_server(config).exclude("south") == [], "one that never enrolled is told in answer to its hello"
    assert server.excluded == {"south": 0}
    for role in (server, restored(server, pure_server(config))):
        assert seen(role.on(hello(config, "south"))) == [rejection("south", "south-1", 608, silence)]
        assert role.choose({"south"}) is None
        assert role.choose({"south", "east"}) == "east"


def test_a_participant_goes_on_with_no_run_but_its_own(config, protocol, site, server):
    other = tiny_config(SITES, protocol=protocol, order="strict", quorum=1)
    for role, fresh in ((site, pure_site(other, "east")), (server, pure_server(other))):
        with pytest.raises(RunError) as stopped:
            restored(role, fresh)
        assert stopped.value.number == 601


class Log:
    """An exit log of so many lines."""

    lines = 3

    def synced_head(self):
        return self.lines, f"head-{self.lines}"


def test_a_server_signs_the_head_of_an_exit_log_and_refuses_a_shorter_one(config, server):
    server.cosign = lambda site, lines, head: f"{site}/{lines}/{head} signed"
    accepted, told, _ = server.on(hello(config, "east", log_lines=7, log_head="seven"))
    assert accepted.kind is Kind.RECEIPT
    assert (told.receiver, told.kind) == ("east", Kind.WITNESSED)
    assert told.scalars == {"lines": 7, "head_signed": "seven", "signature": "east/7/seven signed"}
    for role in (server, restored(server, pure_server(config))):
        assert role.contribution("east")["exit_log"] == 7
        for lines, head in ((6, "six"), (7, "another seven"), (0, "")):
            [cut] = seen(role.on(hello(config, "east", incarnation="east-2", log_lines=lines, log_head=head)))
            assert cut == rejection("east", "east-2", 617, f"its exit log has {lines} lines, and had 7 before")
        for changed in (
            {"log_lines": 2, "log_head": "two"},
            {"incarnation": "e-3", "log_lines": 7, "log_head": "seven"},
        ):
            assert role.on(hello(config, "east", **changed))[0].kind is Kind.RECEIPT, "an old copy, and a new process"
    longer = seen(server.on(hello(config, "east", incarnation="east-4", log_lines=9, log_head="nine")))
    assert longer[1].scalars["lines"] == 9


def test_a_site_tells_the_head_of_its_log_and_keeps_what_is_signed(config, site):
    site.start()
    site.exit_log = Log()
    [said] = seen(site.on(manifest(config)))
    assert (said.scalars["log_lines"], said.scalars["log_head"]) == (3, "head-3")
    signed = {"lines": 3, "head_signed": "head-3", "signature": "00"}
    [kept] = site.on(from_server(Kind.WITNESSED, 0, **signed))
    assert kept == Cosigned(signed)


# ── lost messages ───────────────────────────────────────────────────────────────────────────────


def lacks(sent=0, first=0, last=0):
    """The server's receipt, as the site reads it."""
    return from_server(Kind.RECEIPT, 0, sent=sent, first_missing=first, last_missing=last)


def all_sends(site):
    """What a site sends before it waits."""
    return [effect for effects in iter(site.next, []) for effect in effects if isinstance(effect, Send)]


def test_a_site_sends_the_same_again(config, site):
    site.on(manifest(config))
    sends = all_sends(site)
    last = sends[-1].seq
    for role in (site, restored(site, pure_site(config, "east", 2))):
        again, expected = role.on(lacks(first=1, last=last))
        assert (again, expected) == (Again(SERVER, range(1, last + 1)), Expect(SERVER, 0))
        assert exact([role.repeat(seq) for seq in again.seqs]) == exact(sends)
        assert role.repeat(last + 1) is None, "it comes by itself"
        assert role.on(lacks(first=last, last=role.sequence.last))[0].seqs == range(last, last + 1)


def test_a_site_sends_again_what_it_has_sent_and_not_for_ever(config, site):
    site.on(manifest(config))
    last = all_sends(site)[-1].seq
    for receipt_ in (lacks(first=1, last=site.sequence.last + 1), lacks(first=2, last=1), lacks(last=1)):
        assert refusal_of(site, receipt_).number == 304
    assert refusal_of(site, lacks(sent=site.sequence.last_answer + 1)).number == 304
    for _ in range(REPEATS_MAX // last + 1):
        assert site.on(lacks(first=1, last=last))[0] == Again(SERVER, range(1, last + 1))
    for role in (site, restored(site, pure_site(config, "east", 2))):
        assert role.on(lacks(first=1, last=last)) == [Expect(SERVER, 0)]


def test_a_site_asks_once_and_again_when_it_is_reminded(config, site):
    assert site.ask(SERVER, range(1, 3)) == [], "nothing before it has agreed"
    site.on(manifest(config))
    for _ in range(2):
        asked = greeting(config, "east", first_missing=1, last_missing=2)
        assert seen(site.ask(SERVER, range(1, 3))) == [sent(SERVER, Kind.HELLO, 0, **asked)]
        assert site.ask(SERVER, range(1, 3)) == []
        assert site.ask(SERVER, range(4, 5)) != []
        assert seen(site.remind()) == [sent(SERVER, Kind.HELLO, 0, **greeting(config, "east"))]


def test_a_site_reminds_a_server_that_is_off_a_few_times(config, site):
    for hello_of in (lambda: site.on(manifest(config)), lambda: site.on(lacks())):
        hello_of()
        said = [site.remind() for _ in range(2 * REMINDERS_MAX)]
        assert [len(effects) for effects in said] == [1] * REMINDERS_MAX + [0] * REMINDERS_MAX


def test_a_server_sends_answers_again_that_the_site_has_not(config, protocol, server):
    server.on(hello(config, "east"))
    server.sent["east"] = 4  # as its answers count them
    last = server.sequences["east"].last_answer
    asked = {"first_missing": 1, "last_missing": last}
    for wrong in ({"first_missing": 1, "last_missing": last + 1}, {"last_missing": 1}, {"sent": 2**62}):
        assert refusal_of(server, hello(config, "east", **wrong)).number == 304
    if protocol == "split_frozen":
        assert server.on(hello(config, "east", **asked))[0] == Again("east", range(1, 2)), "the farewell"
        return
    assert server.on(hello(config, "east", **asked))[0] == Again("east", range(1, 5))
    effects = server.on(hello(config, "east", mark=2, released=1, **asked))
    assert effects[:2] == [Release("east", 1), Again("east", range(3, 5))]
    assert server.on(hello(config, "east", **asked))[0] == Again("east", range(2, 5)), "an old copy"


def test_a_site_may_not_ask_for_ever(config, server):
    server.on(hello(config, "east"))
    server.sent["east"] = 1
    asking = hello(config, "east", first_missing=1, last_missing=1)
    assert all(server.on(asking)[0] == Again("east", range(1, 2)) for _ in range(ANSWERS_MAX))
    for role in (server, restored(server, pure_server(config))):
        assert not any(isinstance(effect, Again) for effect in role.on(asking))


def test_a_server_asks_a_site_that_it_knows_and_not_for_ever(config, server):
    assert server.ask("east", range(3, 5)) == []
    server.on(hello(config, "east"))
    asked = [seen(server.ask("east", range(3, 5))) for _ in range(RECEIPTS_MAX)]
    assert asked[0] == [receipt("east", first=3, last=4)]
    assert asked[-1] == [], "the hello had an answer, too"
    assert seen(server.on(hello(config, "east"))) == [Expect("east", 0)], "it goes on without"
