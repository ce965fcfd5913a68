"""Optimizers in whole runs: what a kill leaves of them, each part's own, and how late gradients come."""

from collections import defaultdict
from statistics import median

import pytest
import torch
from msgspec.structs import replace

from nightsplit.server_worker.stream.top import Middle
from nightsplit.shared.config.optimizer import OptimizerSection, PartSection
from nightsplit.shared.learning.optimizers import PartOptimizer, Progress
from nightsplit.shared.protocols.parts import steps_late
from nightsplit.shared.wire.message import SERVER
from tests.harness.night import Night, tiny_config

OPTIMIZERS = [
    OptimizerSection(name="sgd", lr=0.05, momentum=0.9, warmup=5, schedule="cosine", clip_norm=0.5),
    OptimizerSection(name="adam", lr=0.01, betas=(0.0, 0.9), warmup=5, schedule="cosine", clip_norm=0.5),
    OptimizerSection(name="adamw", lr=0.01, weight_decay=0.1, warmup=5, schedule="cosine", clip_norm=0.5),
    OptimizerSection(name="muon", lr=0.02, weight_decay=0.1, warmup=5, schedule="cosine", clip_norm=0.5),
]
SYSTEMS = ["split_labels", "split_u", "split_frozen", "fedavg_transfer", "fedavg_dp_seg", "data_vectors"]


def config_of(protocol, optimizer, **run):
    config = tiny_config(protocol=protocol, **run)
    if protocol in ("fedavg_transfer", "fedavg_dp_seg", "data_vectors"):
        optimizer = replace(optimizer, schedule="constant", clip_norm=None if config.privacy else optimizer.clip_norm)
        config = replace(config, round=replace(config.round, decay="cosine"))
    return replace(config, optimizer=optimizer)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda section: section.name)
@pytest.mark.parametrize("protocol", SYSTEMS)
def test_a_run_whose_workers_die_ends_bit_identical(protocol, optimizer, calm, tmp_path):
    config = config_of(protocol, optimizer, window=4, epochs=2)
    assert Night(config, tmp_path, prefetch=16).shaken(0).fingerprint() == calm(config).fingerprint()


def test_a_part_with_settings_of_its_own_alone_is_trained_differently(tmp_path):
    """One step per site's message; at the end the parts that have no settings of their own have done the same work."""
    base = tiny_config(("north",), protocol="split_u", window=1, epochs=1, codec="fp32", dropout=0.0)
    still = PartSection(lr=1e-12)
    for part in ("bottom", "top", "head"):
        config = replace(base, optimizer=replace(base.optimizer, **{part: still}))
        night = Night(config, tmp_path / part)
        first, last = {}, {}
        for weights in (first, last):
            if weights is last:
                night.run()
            else:
                for worker in night.workers:
                    night.start(worker)
            site = night.roles["north"]
            modules = {"bottom": site.bottom.module, "top": night.roles[SERVER].top.module, "head": site.head.module}
            weights.update({name: next(module.parameters()).detach().clone() for name, module in modules.items()})
        moved = {name: not torch.allclose(first[name], last[name], atol=1e-6) for name in first}
        assert moved == {"bottom": True, "top": True, "head": True, part: False}


def test_every_part_follows_the_schedule_from_begin_to_end(monkeypatch, tmp_path):
    seen = defaultdict(list)
    step = PartOptimizer.step

    def noted(self, progress, *more):
        seen[id(self)].append(progress)
        step(self, progress, *more)

    monkeypatch.setattr(PartOptimizer, "step", noted)
    night = Night(tiny_config(protocol="split_u", window=4, epochs=3, batch_size=8), tmp_path).run()
    plans = {site: night.roles[site].batches.plan for site in night.config.run.sites}
    for site, plan in plans.items():
        steps = 3 * (plan.train // 8)
        for optimizer in (night.roles[site].bottom._optimizer, night.roles[site].head.optimizer):
            assert seen[id(optimizer)] == [Progress(k, k, steps) for k in range(steps)]
    top = seen[id(night.roles[SERVER].top.optimizer)]
    assert [progress.step for progress in top] == list(range(sum(3 * (plan.train // 8) for plan in plans.values())))
    assert max(progress.done / progress.planned for progress in top[:3]) < 0.4
    assert min(progress.done / progress.planned for progress in top[-3:]) > 0.6


@pytest.mark.parametrize(("protocol", "expected"), [("split_labels", False), ("split_u", True)])
def test_gradients_are_as_late_as_announced(protocol, expected, monkeypatch, tmp_path):
    late = []
    backward = Middle.backward

    def noted(self, smashed, gradient, version, *more):
        late.append(self._steps - version)
        return backward(self, smashed, gradient, version, *more)

    monkeypatch.setattr(Middle, "backward", noted)
    monkeypatch.setattr("tests.harness.night.SIZES", {"north": 80, "south": 80, "east": 80})
    config = tiny_config(protocol=protocol, window=6, epochs=4)
    Night(config, tmp_path).run()
    assert bool(late) is expected
    if expected:
        assert abs(median(late) - steps_late(config)["top"]) <= 1
