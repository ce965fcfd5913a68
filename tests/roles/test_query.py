"""Both sides of he_clstm: what is encrypted for each step, what comes back, and who has to remember what.

step 0   frame                ─▶  h, c, votes    refresh: blinded, at level 0
step 1   frame, h, c, votes   ─▶  logits
one_shot: both frames at once ─▶  logits
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from nightsplit.server_worker.protocols.he_clstm import HeClstmServer
from nightsplit.shared.errors import Refused
from nightsplit.shared.he.sequences import parameters_for, rotations_of
from nightsplit.shared.he.weights import ClassifierWeights
from nightsplit.shared.models.sequences import SequenceClassifier
from nightsplit.shared.protocols.query import HEADER_BYTES, Parcels, chunks
from nightsplit.shared.wire.message import SERVER, Header, Kind, Message
from nightsplit.site_worker.protocols.he_clstm import HeClstmSite
from nightsplit.site_worker.query.keys import SecretKeys
from nightsplit.site_worker.query.store import Origin, Query

FRAMES, FEATURES, HIDDEN = 2, 2, 1
SECRET = b"s" * 32
SEQUENCES = np.tanh(np.random.default_rng(1).normal(size=(3, FRAMES, FEATURES)))
QUERY = Query(
    number=1, keys="", packing="slots", origins=tuple(Origin(1, row, "p") for row in (1, 2, 3)), features=SEQUENCES,
    step=0, sent=False, state=None, blinding="", logits=None, refusal=None,
)  # fmt: skip


class Sides:
    """A model, the keys of a site that asks it, and both roles."""

    def __init__(self, folder, recurrent):
        torch.manual_seed(2)
        self.network = SequenceClassifier(FRAMES, FEATURES, HIDDEN, recurrent).double()
        self.classifier = ClassifierWeights.of(self.network.state_dict())
        self.ckks = parameters_for(self.classifier)
        secret, self.keys = SecretKeys.make(self.ckks, folder, rotations_of(self.ckks, self.classifier))
        self.site, self.server = HeClstmSite(self.classifier, secret), HeClstmServer(self.classifier, SECRET)

    def levels(self, pieces):
        return [self.ckks.level_of(self.ckks.read_any(piece)) for piece in pieces]

    def expected(self):
        with torch.no_grad():
            return self.network(torch.tensor(SEQUENCES))[:, 0].numpy()


@pytest.fixture(scope="module")
def refresh(tmp_path_factory):
    return Sides(tmp_path_factory.mktemp("refresh"), recurrent=True)


@pytest.fixture(scope="module")
def one_shot(tmp_path_factory):
    return Sides(tmp_path_factory.mktemp("one_shot"), recurrent=False)


@pytest.fixture(scope="module")
def first_step(refresh):
    """Both sides of step 0: what was asked, and what was answered."""
    asked = refresh.site.encrypt_step(QUERY)
    return asked, refresh.server.answer(refresh.keys, 0, "slots", asked, "", "nonce 1")


@pytest.fixture
def second_query(refresh, first_step):
    """The query as the site goes on with it."""
    state = refresh.site.decrypt_state(QUERY, first_step[1])
    return replace(QUERY, step=1, state=state, blinding="nonce 1")


def test_each_step_of_refresh_has_its_ciphertexts(refresh, first_step, second_query):
    asked, answered = first_step
    assert (refresh.levels(asked), refresh.levels(answered)) == ([3], [0, 0, 0])
    pieces = refresh.site.encrypt_step(second_query)
    assert refresh.levels(pieces) == [3, 3, 2, 2]
    last = refresh.server.answer(refresh.keys, 1, "slots", pieces, "nonce 1", "nonce 2")
    assert refresh.levels(last) == [0]
    np.testing.assert_allclose(refresh.site.decrypt_logits(second_query, last), refresh.expected(), atol=1e-4)


def test_another_server_with_the_same_secret_goes_on(refresh, second_query):
    """A server has nothing to restore: the query brings it all."""
    pieces = refresh.site.encrypt_step(second_query)
    right, wrong = (
        HeClstmServer(refresh.classifier, secret).answer(refresh.keys, 1, "slots", pieces, "nonce 1", "nonce 2")
        for secret in (SECRET, b"t" * 32)
    )
    np.testing.assert_allclose(refresh.site.decrypt_logits(second_query, right), refresh.expected(), atol=1e-4)
    assert np.abs(refresh.site.decrypt_logits(second_query, wrong) - refresh.expected()).min() > 1


def test_the_site_does_not_see_its_state(refresh, first_step):
    again = refresh.server.answer(refresh.keys, 0, "slots", first_step[0], "", "nonce 3")
    first, second = (refresh.site.decrypt_state(QUERY, pieces) for pieces in (first_step[1], again))
    assert first.shape == (refresh.site.packing_for(3)[1], 2 * HIDDEN + 1)
    assert np.abs(first).mean() > 1e5
    assert np.abs(first - second).mean() > 1e5, "a nonce blinds once"


def test_one_shot_asks_once(one_shot):
    query = replace(QUERY, packing="batch")
    assert one_shot.site.steps == one_shot.server.steps == 1
    assert one_shot.site.packing_for(3) == ("batch", one_shot.ckks.slots)
    pieces = one_shot.site.encrypt_step(query)
    assert one_shot.levels(pieces) == [one_shot.ckks.top] * FRAMES * FEATURES
    answered = one_shot.server.answer(one_shot.keys, 0, "batch", pieces, "", "nonce")
    assert len(answered) == 1
    np.testing.assert_allclose(one_shot.site.decrypt_logits(query, answered), one_shot.expected(), atol=1e-4)


@pytest.mark.parametrize("step", [-1, FRAMES])
def test_the_server_refuses_a_step_that_is_none(refresh, second_query, step):
    with pytest.raises(Refused, match=f"there is no step {step} of {FRAMES}") as refusal:
        refresh.server.answer(
            refresh.keys, step, "slots", refresh.site.encrypt_step(second_query), "nonce 1", "nonce 2"
        )
    assert refusal.value.number == 304


@pytest.mark.parametrize(
    ("step", "packing", "copies", "number"),
    [(0, "boxes", 1, 304), (0, "slots", 2, 304), (0, "slots", 0, 304), (1, "slots", 4, 313)],
    ids=["packing", "too many", "none", "levels"],
)
def test_the_server_refuses_other_ciphertexts_than_a_step_has(refresh, first_step, step, packing, copies, number):
    with pytest.raises(Refused) as refusal:
        refresh.server.answer(refresh.keys, step, packing, first_step[0] * copies, "", "nonce")
    assert refusal.value.number == number


def test_either_side_refuses_what_it_cannot_read(refresh, one_shot, first_step):
    asked, answered = first_step
    damaged = [bytes(len(asked[0]))]
    reads = [
        lambda: refresh.server.answer(refresh.keys, 0, "slots", damaged, "", "nonce"),
        lambda: refresh.server.answer(refresh.keys, 0, "slots", answered[:1], "", "nonce"),
        lambda: refresh.server.answer(one_shot.keys, 0, "slots", asked, "", "nonce"),
        lambda: refresh.site.decrypt_state(QUERY, damaged * 3),
    ]
    for read in reads:
        with pytest.raises(Refused) as refusal:
            read()
        assert refusal.value.number == 313
    for read in (refresh.site.decrypt_state, refresh.site.decrypt_logits):
        with pytest.raises(Refused) as refusal:
            read(QUERY, answered[:2])
        assert refusal.value.number == 304


# ── parcels: the messages of a query ────────────────────────────────────────────────────────────

HEADER = Header("film", "north", SERVER, Kind.QUERY, 1, version=1)
PIECES = [b"a" * 5, b"", b"b" * 6]


def parcel(pieces=PIECES, header=HEADER):
    return list(chunks(header, pieces, HEADER_BYTES + 4, {"blinding": "nonce"}))


def test_a_parcel_travels_in_chunks_that_fit():
    messages = parcel()
    assert [message.header for message in messages] == [HEADER] * 3
    assert [message.tensors["content"].numpy().tobytes() for message in messages] == [b"aaaa", b"abbb", b"bbb"]
    assert {tuple(message.tensors["sizes"].tolist()) for message in messages} == {(5, 0, 6)}
    told = [{name: value for name, value in message.scalars.items() if name != "sha256"} for message in messages]
    assert told == [{"chunk": chunk, "chunks": 3, "blinding": "nonce"} for chunk in range(3)]


def test_a_parcel_is_whole_with_its_last_chunk_in_whatever_order():
    first, second, third = parcel()
    parcels = Parcels()
    assert [parcels.add(one) for one in (third, first, first, second)] == [None, None, None, PIECES]
    assert parcels.add(first) is None, "a copy of what has been taken begins anew"


def test_parcels_of_several_steps_do_not_mix():
    parcels = Parcels()
    later = parcel(PIECES[::-1], replace(HEADER, version=2))
    for one in (*parcel()[:2], *later[:2]):
        assert parcels.add(one) is None
    assert (parcels.add(later[2]), parcels.add(parcel()[2])) == (PIECES[::-1], PIECES)


def test_what_was_encrypted_anew_replaces_what_came_of_it_before():
    parcels, anew = Parcels(), parcel([b"c" * 5, b"", b"d" * 6])
    for one in (*parcel()[:2], *anew[:2]):
        assert parcels.add(one) is None
    assert parcels.add(anew[2]) == [b"c" * 5, b"", b"d" * 6]


def test_a_parcel_that_was_altered_is_refused_and_forgotten():
    parcels, (first, second, third) = Parcels(), parcel()
    altered = Message(third.header, {**third.tensors, "content": torch.zeros(3, dtype=torch.uint8)}, third.scalars)
    parcels.add(first)
    parcels.add(second)
    with pytest.raises(Refused, match="was altered on its way"):
        parcels.add(altered)
    assert [parcels.add(one) for one in (first, second, third)] == [None, None, PIECES]
    with pytest.raises(Refused, match="chunk 3 of 3 is impossible"):
        parcels.add(Message(third.header, third.tensors, {**third.scalars, "chunk": 3}))
