import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nightsplit.shared.he.packing import Batch, Packing, Slots

sizes = st.tuples(st.integers(1, 40), st.integers(1, 12), st.sampled_from([1024, 2048, 4096]), st.integers(0, 2**32))


def drawn(packing: Packing, seed: int) -> tuple[int, np.random.Generator]:
    generator = np.random.default_rng(seed)
    return int(generator.integers(1, packing.capacity + 1)), generator


def packings(features: int, hidden: int, slots: int) -> list[Packing]:
    return [Batch(slots), Slots(slots, features, hidden)]


@settings(deadline=None)
@given(sizes)
def test_what_is_packed_comes_back(size: tuple[int, int, int, int]) -> None:
    features, hidden, slots, seed = size
    for packing in packings(features, hidden, slots):
        n, generator = drawn(packing, seed)
        state, votes = generator.normal(size=(n, hidden)), generator.normal(size=n)
        assert np.array_equal(packing.read_state(packing.state(state), n), state)
        assert np.array_equal(packing.read_votes(packing.votes(votes), n), votes)
        assert np.array_equal(packing.votes(votes)[:n], votes)
        vectors = [*packing.frame(generator.normal(size=(n, features))), *packing.state(state), packing.votes(votes)]
        assert {vector.shape for vector in vectors} == {(slots,)}


@settings(deadline=None)
@given(sizes)
def test_what_covers_a_state_can_be_taken_away_again(size: tuple[int, int, int, int]) -> None:
    """A server adds numbers to all slots; the site reads and packs anew."""
    features, hidden, slots, seed = size
    for packing in packings(features, hidden, slots):
        n, generator = drawn(packing, seed)
        state, votes = generator.normal(size=(n, hidden)), generator.normal(size=n)
        covers = [generator.normal(size=slots) for _ in packing.state(state)]
        seen = packing.read_state([a + b for a, b in zip(packing.state(state), covers, strict=True)], packing.capacity)
        back = packing.state(seen)
        taken = packing.state(packing.read_state(covers, packing.capacity))
        for a, b, c in zip(back, taken, packing.state(state), strict=True):
            assert np.allclose(a - b, c, atol=1e-12)
        cover = generator.normal(size=slots)
        back_votes = packing.votes(packing.read_votes(packing.votes(votes) + cover, packing.capacity))
        taken_votes = packing.votes(packing.read_votes(cover, packing.capacity))
        assert np.allclose(back_votes - taken_votes, packing.votes(votes), atol=1e-9)


@settings(deadline=None)
@given(sizes)
def test_a_rotation_by_the_capacity_moves_dimensions(size: tuple[int, int, int, int]) -> None:
    features, hidden, slots, seed = size
    packing = Slots(slots, features, hidden)
    n, generator = drawn(packing, seed)
    numbers = generator.normal(size=(n, features))
    (vector,) = packing.frame(numbers)
    turned = np.roll(vector, -packing.capacity)  # as a server turns a ciphertext
    for feature in range(features - 1):
        here = slice(feature * packing.capacity, feature * packing.capacity + n)
        assert np.array_equal(vector[here], numbers[:, feature])
        assert np.array_equal(turned[here], numbers[:, feature + 1])
    around = np.roll(vector, -packing.period * packing.capacity)
    assert np.array_equal(around, vector)
    assert packing.dimensions * packing.capacity == slots


def test_the_parts_of_a_vote_are_in_all_dimensions() -> None:
    packing = Slots(64, 3, 2)
    parts = np.random.default_rng(0).normal(size=(packing.dimensions, packing.capacity))
    assert np.allclose(packing.read_votes(parts.ravel(), 5), parts.sum(0)[:5])


@pytest.mark.parametrize("packing", [Batch(64), Slots(64, 3, 2)])
def test_slots_of_absent_sequences_are_zero(packing: Packing) -> None:
    n = packing.capacity - 1
    for vector in [*packing.frame(np.ones((n, 3))), *packing.state(np.ones((n, 2)))]:
        assert vector.reshape(-1, packing.capacity)[:, n:].tolist() == [[0.0]] * (64 // packing.capacity)
    assert packing.votes(np.ones(n)).sum() == n


@pytest.mark.parametrize("packing", [Batch(64), Slots(64, 3, 2)])
def test_too_many_sequences(packing: Packing) -> None:
    n = packing.capacity + 1
    for wrong in (lambda: packing.frame(np.ones((n, 3))), lambda: packing.state(np.ones((n, 2)))):
        with pytest.raises(ValueError, match=f"{n} sequences, but a capacity of {n - 1}"):
            wrong()
    with pytest.raises(ValueError, match="capacity of"):
        packing.votes(np.ones(n))


def test_too_many_dimensions() -> None:
    with pytest.raises(ValueError, match="64 dimensions do not fit into 32 slots"):
        Slots(32, 5, 16)


def test_the_setting_of_the_documents() -> None:
    packing = Slots(4096, 32, 16)
    assert (packing.dimensions, packing.capacity, packing.rotations) == (64, 64, (64, 256, 1024))
    assert Batch(4096).capacity == 4096
    assert Batch(4096).rotations == ()
