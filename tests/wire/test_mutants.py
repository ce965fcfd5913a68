"""A hundred thousand mutants of every kind of message: each is read in time, and valid or refused by number."""

from __future__ import annotations

import gc
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from nightsplit.shared.protocols.spec import PROTOCOLS
from nightsplit.shared.wire import format as wire
from nightsplit.shared.wire import head
from nightsplit.shared.wire.codecs import REMEDIES
from nightsplit.shared.wire.message import Header, Kind, Message
from nightsplit.shared.wire.schema import Payload, ScalarSpec, TensorSpec
from tests.faults import fuzz
from tests.faults.fuzz import GROWTH_MB, HANG_MS, Campaign, Growth, InvalidError, check, read, replay, save
from tests.faults.mutants import MUTATIONS, mutant
from tests.faults.specimens import LIMIT, Specimen, rebuilt, specimens

SEED = 3
MUTANTS = 100_000


FLIPPED = (
    "data_vectors/mlp/fp32/hello",
    "split_frozen/mlp/fp16/smashed",
    "split_u/mlp/int8+zstd/head_gradient",
    "data_vectors/mlp/fp32/report",
)


@pytest.fixture(scope="module")
def good() -> list[Specimen]:
    return specimens()


def test_specimens_are_every_kind_of_every_protocol(good: list[Specimen]) -> None:
    names = {specimen.name.split("/")[0] for specimen in good}
    assert names == set(PROTOCOLS)
    assert {Kind(specimen.name.split("/")[-1]) for specimen in good} == set(Kind)
    for specimen in good:
        payload = specimen.contract[head.read_head(specimen.body).header.kind]
        assert check(read(specimen.contract, specimen.body), payload, specimen.body)
        assert rebuilt(specimen.fields, specimen.parts) == specimen.body


@pytest.mark.timeout(600)  # some ten seconds of CPU, on a machine that may be shared
def test_a_hundred_thousand_mutants(good: list[Specimen], tmp_path: Path) -> None:
    campaign = Campaign(good, SEED)
    gc.collect()
    gc.freeze()  # so that no message is charged for a walk through all modules
    try:
        growth = Growth()
        campaign.run(range(MUTANTS))
        grown = growth.mebibytes()
    finally:
        gc.unfreeze()
    save(campaign, tmp_path)
    assert (campaign.messages, campaign.crashes, campaign.hangs) == (MUTANTS, 0, 0), (tmp_path, campaign.failures)
    assert grown < GROWTH_MB
    assert campaign.accepted + campaign.refused.total() == MUTANTS
    # Mutants get past the first check: every number that reading has occurs, and many are accepted.
    assert set(campaign.refused) == set(REMEDIES)
    assert campaign.accepted > MUTANTS // 20


def test_a_mutant_is_a_function_of_seed_and_number(good: list[Specimen]) -> None:
    made, again, other = (
        [(one.name, name, body) for one, name, body in (mutant(of, seed, number) for number in range(300))]
        for of, seed in ((good, 5), (specimens(), 5), (good, 6))
    )
    assert made == again
    assert made != other
    assert {name for _, name, _ in made} == {mutation.__name__.strip("_") for mutation in MUTATIONS}


def test_every_bit_of_a_message_flipped(good: list[Specimen]) -> None:
    """There is no checksum: a flip in a value may be accepted, and is then a valid message."""
    campaign = Campaign(good, SEED)
    flipped = [specimen for specimen in good if specimen.name in FLIPPED]
    assert len(flipped) == len(FLIPPED)
    for specimen in flipped:
        for at in range(8 * len(specimen.body)):
            body = bytearray(specimen.body)
            body[at // 8] ^= 1 << at % 8
            assert campaign.read(specimen.contract, bytes(body)) is None, (specimen.name, at)
    assert 0 < campaign.accepted < campaign.messages


# ── the campaign sees what it looks for ─────────────────────────────────────────────────────────


def broken(how: Any, monkeypatch: pytest.MonkeyPatch, good: list[Specimen]) -> Campaign:
    """A campaign over a reader that has a bug."""
    sound = wire.decode

    def decode(body: bytes, payload: Payload, max_bytes: int) -> Message:
        return how(sound(body, payload, max_bytes))

    monkeypatch.setattr(fuzz.wire, "decode", decode)
    campaign = Campaign(good, SEED)
    campaign.run(range(40))
    return campaign


def test_a_crash_is_counted_and_replayed(monkeypatch: pytest.MonkeyPatch, good: list[Specimen], tmp_path: Path) -> None:
    campaign = broken(lambda message: message.tensors["absent"], monkeypatch, good)
    assert campaign.crashes == len(campaign.failures) > 0
    save(campaign, tmp_path)
    path = next(tmp_path.iterdir())
    why = replay(path)
    assert why is not None
    assert why.splitlines()[-1] == json.loads(path.read_text())["why"].splitlines()[-1] == "KeyError: 'absent'"
    monkeypatch.undo()
    assert replay(path) is None


def test_a_hang_is_counted(monkeypatch: pytest.MonkeyPatch, good: list[Specimen]) -> None:
    def slow(message: Message) -> Message:
        until = time.thread_time_ns() + 1.2e6 * HANG_MS
        while time.thread_time_ns() < until:
            pass
        return message

    campaign = broken(slow, monkeypatch, good)
    assert campaign.hangs == campaign.accepted > 0


def test_what_is_accepted_must_be_valid() -> None:
    header = Header("fuzz", "north", "server", Kind.SMASHED, 1)
    payload = Payload(Kind.NOTED, {"a": TensorSpec(torch.float32, ("batch",))}, {"n": ScalarSpec(int)})
    for tensor, number in ((torch.full((2,), torch.nan), 1), (torch.zeros(2).half(), 1), (torch.zeros(2), True)):
        with pytest.raises(InvalidError):
            check(Message(header, {"a": tensor}, {"n": number}), payload, b"")
    message = Message(header, {"a": torch.zeros(2)}, {"n": 1})
    with pytest.raises(InvalidError, match="other bytes"):
        check(message, payload, b"")
    assert check(message, payload, b"".join(wire.encode(message, payload, LIMIT)))
