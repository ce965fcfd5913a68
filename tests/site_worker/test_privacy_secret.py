import stat
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from nightsplit.shared.errors import RunError
from nightsplit.site_worker.privacy.secret import Secret, make_secret, read_secret

SECRET = Secret(bytes(range(32)))


def test_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.key"
    secret = make_secret(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(secret.key) == 32
    assert read_secret(path) == secret
    assert make_secret(tmp_path / "b.key") != secret
    with pytest.raises(FileExistsError):
        make_secret(path)
    assert read_secret(path) == secret
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.key", "b.key"]


def test_a_secret_that_others_may_read_is_refused(tmp_path: Path) -> None:
    make_secret(tmp_path / "a.key")
    (tmp_path / "a.key").chmod(0o640)
    with pytest.raises(RunError) as caught:
        read_secret(tmp_path / "a.key")
    assert caught.value.number == 612


def test_half_a_secret_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.key"
    make_secret(path)
    path.write_bytes(path.read_bytes()[:16])
    with pytest.raises(RunError) as caught:
        read_secret(path)
    assert caught.value.number == 612


def test_every_purpose_has_its_own() -> None:
    derived = [SECRET.derive("a", 1), SECRET.derive("a", 2), SECRET.derive("a1"), SECRET.derive("a", b"1", 1)]
    assert len({secret.key for secret in [SECRET, *derived]}) == 5
    assert SECRET.derive("a", 1) == derived[0]
    assert "derive" not in repr(SECRET)
    assert str(SECRET.key) not in repr(SECRET)


@pytest.mark.parametrize("secure", [False, True])
def test_normals_are_normal(secure: bool) -> None:
    drawn = SECRET.normals(600_000, secure=secure)  # more than two blocks
    assert drawn.dtype == np.float32
    # The seed is fixed, so this passes always or never; a spread of 1.01 in place of 1 gives p < 1e-10.
    assert stats.kstest(drawn, "norm").pvalue > 1e-3
    assert stats.kstest(drawn * np.float32(1.01), "norm").pvalue < 1e-3
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.005
    assert abs(np.corrcoef(drawn[:300_000], drawn[300_000:])[0, 1]) < 0.01
    assert len(np.unique(drawn)) > 500_000


@pytest.mark.parametrize("secure", [False, True])
def test_a_replay_draws_the_same_and_another_secret_does_not(secure: bool) -> None:
    first = SECRET.derive("noise", 7).normals(1000, secure=secure)
    assert np.array_equal(first, SECRET.derive("noise", 7).normals(1000, secure=secure))
    for other in (SECRET.derive("noise", 8), Secret(bytes(32)).derive("noise", 7)):
        assert abs(np.corrcoef(first, other.normals(1000, secure=secure))[0, 1]) < 0.15


@pytest.mark.parametrize("secure", [False, True])
def test_noise_is_not_drawn_from_32_bits(secure: bool) -> None:
    """Keys that agree in their last 32 bits, and then in their first, as torch's generator would take them."""
    keys = [bytes(12) + bytes([n]) + bytes(19) for n in range(3)]
    drawn = [Secret(key).normals(100, secure=secure) for key in keys]
    assert not any(np.array_equal(one, other) for one, other in pairwise(drawn))
    assert torch.equal(
        torch.randn(9, generator=torch.Generator().manual_seed(5)),
        torch.randn(9, generator=torch.Generator().manual_seed(5 + 2**32)),
    ), "torch has mended this: the generator may be used again"


def test_poisson_sampling() -> None:
    sizes, count, rate = [], 500, 0.06
    seen = np.zeros(count)
    for step in range(2000):
        rows = SECRET.derive("records", step).records(count, rate)
        assert len(np.unique(rows)) == len(rows)
        sizes.append(len(rows))
        seen[rows] += 1
    # Binomial: mean 30, variance 28.2; each record in 120 of 2000 batches, with a deviation of 10.6.
    assert np.mean(sizes) == pytest.approx(count * rate, abs=0.5)
    assert np.var(sizes) == pytest.approx(count * rate * (1 - rate), rel=0.15)
    assert abs(seen - 2000 * rate).max() < 5 * 10.7


def test_a_batch_may_be_empty_and_may_be_all() -> None:
    assert any(len(SECRET.derive(step).records(3, 0.1)) == 0 for step in range(20))
    assert list(SECRET.records(5, 1.0)) == [0, 1, 2, 3, 4]
