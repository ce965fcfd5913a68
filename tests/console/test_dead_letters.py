"""Dead letters: what nightsplit dlq lists, shows and discards, over every broker."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from nightsplit.console import dead_letters
from nightsplit.console.dead_letters import discard_letters, list_letters, replay_letters, show_letter
from nightsplit.shared.errors import NightsplitError
from nightsplit.shared.transport import Delivery
from tests.harness.dead_letters import (
    contents,
    depth,
    file_of,
    letters,
    listed,
    put,
)
from tests.harness.services import wait_until
from tests.protocols.test_poison import POISON, header


def test_a_list_reads_through_and_changes_nothing(night, capsys):
    number = 300
    put(night, night.queues["north"].dead, *letters(night, number))
    put(night, night.queues["south"].dead, *letters(night, 2, "south"))
    first = listed(file_of(night), capsys)
    assert [(letter["site"], letter["message_id"]) for letter in first] == [
        *(("north", f"night/north/server/smashed/{n}") for n in range(number)),
        *(("south", f"night/south/server/smashed/{n}") for n in range(2)),
    ]
    assert first[2] == {
        "id": first[2]["id"], "site": "north", "number": 306, "sender": "north", "time": "2026-03-01T22:00:00+00:00",
        "reason": "E306 Tensor has an unexpected shape: it is odd. Fix: mend it. (page)", "size": 70_001,
        "queue": night.queues["north"].up.name, "message_id": "night/north/server/smashed/2",
    }  # fmt: skip
    assert len({letter["id"] for letter in first}) == number + 2
    assert listed(file_of(night), capsys) == first
    assert listed(file_of(night, "north"), capsys) == first[:number]
    assert listed(file_of(night, "south"), capsys) == first[number:]
    depth(night, night.queues["north"].dead, number)

    discard_letters(file_of(night), [first[7]["id"], first[150]["id"]])
    assert capsys.readouterr().out == "2 dead letters discarded\n"
    assert listed(file_of(night), capsys) == [letter for n, letter in enumerate(first) if n not in (7, 150)]
    discard_letters(file_of(night, "south"), None)
    assert listed(file_of(night), capsys) == [letter for n, letter in enumerate(first[:number]) if n not in (7, 150)]
    discard_letters(file_of(night), None)
    assert capsys.readouterr().out == "298 dead letters discarded\n"
    list_letters(file_of(night), as_json=False)
    assert capsys.readouterr().out == "0 dead letters\n"


def test_ids_that_are_not_there(night, capsys):
    put(night, night.queues["north"].dead, *letters(night, 3))
    ids = [letter["id"] for letter in listed(file_of(night), capsys)]
    with pytest.raises(NightsplitError, match="E606 No such dead letter: no letter has the id abc, def; the other 2"):
        discard_letters(file_of(night), ["abc", ids[2], "def", ids[0]])
    assert [letter["id"] for letter in listed(file_of(night), capsys)] == [ids[1]]
    with pytest.raises(NightsplitError, match="E606"):
        show_letter(file_of(night), "abc", as_json=False)
    with pytest.raises(NightsplitError, match="E606"):
        show_letter(file_of(night, "south"), ids[1], as_json=False)
    with pytest.raises(NightsplitError, match="E602"):
        list_letters(file_of(night, "west"), as_json=False)


def test_a_letter_that_names_no_queue_of_its_site_goes_nowhere(night, capsys):
    night.broker.declare([replace(night.queues["south"].up, name="elsewhere", key="elsewhere")])
    for origin in ({}, {"queue": night.queues["south"].up.name}, {"queue": "elsewhere"}):
        put(night, night.queues["north"].dead, ("x", b"body", origin))
        for chosen in (None, [letter["id"] for letter in listed(file_of(night), capsys)]):
            with pytest.raises(NightsplitError, match="E607"):
                replay_letters(file_of(night), chosen)
        discard_letters(file_of(night), None)
    depth(night, night.queues["south"].up, 0)


def test_show_tells_all_but_the_values(night, capsys):
    bodies = [POISON["NaN"][0](header(5)), b"\x1b[2Jnothing of ours"]
    around = {"number": "307", "reason": "E307 x: y. Fix: z.", "queue": "\x1b[31mred\n"}
    put(night, night.queues["north"].dead, *((f"dead/m{n}/1", body, around) for n, body in enumerate(bodies)))
    first, second = (letter["id"] for letter in listed(file_of(night), capsys))

    show_letter(file_of(night), first, as_json=True)
    shown = json.loads(capsys.readouterr().out)
    assert shown["letter"]["id"] == first
    assert shown["headers"] == around
    assert shown["message"] == {
        "run": "night", "sender": "north", "receiver": "server", "kind": "smashed", "seq": 5, "reply_to": 0,
        "version": 4, "fence": 0,
    }  # fmt: skip
    show_letter(file_of(night), first, as_json=False)
    plain = capsys.readouterr().out
    assert "message seq          5\n" in plain
    assert "\x1b" not in plain

    show_letter(file_of(night), second, as_json=False)
    plain = capsys.readouterr().out
    assert "message header       E301 Not a nightsplit message" in plain
    assert "header queue         ?[31mred?\n" in plain
    list_letters(file_of(night), as_json=False)
    assert "\x1b" not in capsys.readouterr().out


def test_the_queue_is_in_use(night, capsys, monkeypatch):
    put(night, night.queues["north"].dead, *letters(night, 3))
    monkeypatch.setattr(dead_letters, "TIMEOUT_S", 0.5)
    with night.broker.link([night.queues["north"].dead], 8, "another command") as link:
        wait_until(lambda: isinstance(link.receive(0.1), Delivery), 10, "its first letter")
        with pytest.raises(NightsplitError, match="E210"):
            list_letters(file_of(night), as_json=True)
    monkeypatch.setattr(dead_letters, "TIMEOUT_S", 30.0)
    assert len(listed(file_of(night), capsys)) == 3  # and the bookmark that stayed is no letter
    depth(night, night.queues["north"].dead, 3)


def test_more_letters_than_one_prefetch_holds(night, capsys, monkeypatch):
    put(night, night.queues["north"].dead, *letters(night, 5))
    everything = listed(file_of(night), capsys)
    with monkeypatch.context() as fewer:
        fewer.setattr(dead_letters, "PREFETCH_MAX", 3)
        list_letters(file_of(night), as_json=True)
        found = json.loads(capsys.readouterr().out)
        assert (found["complete"], found["dead_letters"]) == (False, everything[:3])
        list_letters(file_of(night), as_json=False)
        assert capsys.readouterr().out.endswith("3 dead letters; there are more behind the oldest 3 of a site\n")
    replay_letters(file_of(night), None)
    assert listed(file_of(night), capsys) == []
    assert [message.body for message in contents(night, night.queues["north"].up, 5)] == [
        body for _, body, _ in letters(night, 5)
    ]
