"""The secret seed of a site is made once and kept (docs/explanation/attacks.md, S3)."""

from __future__ import annotations

import pytest
import torch

from nightsplit.server_worker.worker import ServerWorker
from nightsplit.shared.errors import StateError
from nightsplit.site_worker.protocols import make_site
from nightsplit.site_worker.worker import SEED, SiteWorker
from tests.harness.night import tiny_config, tiny_splits
from tests.harness.workers import Hospital


def bottom_of(config, seed, tmp_path):
    return make_site("north", config, tiny_splits("north"), "north-1", tmp_path, seed=seed)


@pytest.mark.parametrize("protocol", ["split_labels", "split_u"])
def test_first_weights_and_order_follow_from_the_secret(protocol, tmp_path):
    config = tiny_config(("north",), protocol=protocol)
    one, same, other = (bottom_of(config, seed, tmp_path) for seed in (b"a" * 32, b"a" * 32, b"b" * 32))
    public = bottom_of(config, None, tmp_path)
    weights = [torch.cat([p.flatten() for p in site.bottom.module.parameters()]) for site in (one, same, other, public)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[3])
    first = one.batches.plan.item(1)
    assert torch.equal(one.batches.inputs(first), same.batches.inputs(first))
    assert not torch.equal(one.batches.inputs(first), other.batches.inputs(first))


@pytest.mark.parametrize(("protocol", "settings"), [("split_frozen", {}), ("split_labels", {"bottoms": "averaged"})])
def test_weights_that_must_be_equal_everywhere_stay_public(protocol, settings, tmp_path):
    config = tiny_config(("north",), protocol=protocol, **settings)
    secret, public = bottom_of(config, b"a" * 32, tmp_path), bottom_of(config, None, tmp_path)
    for one, other in zip(secret.bottom.module.parameters(), public.bottom.module.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_hospital_makes_its_own_and_keeps_it(tmp_path):
    hospital = Hospital(tmp_path / "run", epochs=2)
    seed = hospital.folder / "state" / "north" / SEED
    seed.unlink()
    ServerWorker(hospital.folder / "server.toml").open_run()
    SiteWorker(hospital.folder / "north.toml").work(0.3)
    made = seed.read_bytes()
    assert len(made) == 32
    assert seed.stat().st_mode & 0o077 == 0
    SiteWorker(hospital.folder / "north.toml").work(0.3)
    assert seed.read_bytes() == made
    seed.unlink()
    with pytest.raises(StateError) as found:
        SiteWorker(hospital.folder / "north.toml").work(0.3)
    assert found.value.number == 514
