"""[optimizer]: which keys fit a run, and what they change of its digest."""

import pytest

from nightsplit.shared.config.optimizer import OptimizerSection
from nightsplit.shared.errors import ConfigError
from nightsplit.shared.protocols.load import load_run
from nightsplit.shared.protocols.parts import steps_late, suits_late, trained_parts
from tests.config.test_config import PRIVATE, ROUNDS, path

__all__ = ["path"]

U = ['run.protocol="split_u"', "model.head_cut=2"]
FROZEN = ['run.protocol="split_frozen"']


@pytest.mark.parametrize(
    ("changes", "key", "remedy"),
    [
        (["optimizer.head.lr=0.1"], "optimizer.head", "remove that table"),
        ([*FROZEN, "optimizer.bottom.lr=0.1"], "optimizer.bottom", "remove that table"),
        ([*FROZEN, "optimizer.head.lr=0.1"], "optimizer.head", "remove that table"),
        ([*ROUNDS, "optimizer.top.lr=0.1"], "optimizer.top", "remove that table"),
        ([*ROUNDS, 'optimizer.schedule="cosine"'], "optimizer.schedule", "decay"),
        ([*ROUNDS, *PRIVATE, "optimizer.clip_norm=1.0"], "optimizer.clip_norm", "remove it"),
        (["optimizer.momentum=0.9"], "optimizer.momentum", "another name"),
        (['optimizer.name="muon"', "optimizer.momentum=0.9"], "optimizer.momentum", "another name"),
        (['optimizer.name="sgd"', "optimizer.betas=[0.0, 0.9]"], "optimizer.betas", "another name"),
        (["optimizer.top.momentum=0.9"], "optimizer.top.momentum", "another name"),
        ([*U, 'optimizer.head.name="sgd"', "optimizer.head.betas=[0.0, 0.9]"], "optimizer.head.betas", "another name"),
        (['optimizer.name="lion"'], "optimizer.name", "correct"),
        (['optimizer.top.name="lion"'], "optimizer.top.name", "correct"),
        (["optimizer.top.rate=1.0"], "optimizer.top", "correct"),
        (["optimizer.betas=[0.9]"], "optimizer.betas", "correct"),
        (["optimizer.betas=[0.9, 1.0]"], "optimizer.betas[1]", "correct"),
        (["optimizer.warmup=-1"], "optimizer.warmup", "correct"),
        (["optimizer.clip_norm=0.0"], "optimizer.clip_norm", "correct"),
        (["optimizer.clip_norm=inf"], "optimizer.clip_norm", "finite"),
        (["optimizer.top.lr=inf"], "optimizer.top", "finite"),
    ],
)
def test_what_a_run_has_no_use_for_is_refused_by_name(path, changes, key, remedy):
    with pytest.raises(ConfigError) as caught:
        load_run(path, changes)
    assert caught.value.number == 103
    assert f": {key}: " in caught.value.sentence
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    "changes",
    [
        [*U, "optimizer.bottom.lr=0.1", 'optimizer.top.name="muon"', "optimizer.head.clip_norm=1.0"],
        ["optimizer.betas=[0.0, 0.9]", "optimizer.warmup=10", 'optimizer.schedule="cosine"', "optimizer.clip_norm=1.0"],
        ['optimizer.name="sgd"', "optimizer.momentum=0.9", 'optimizer.top.name="adam"', "optimizer.top.betas=[0, 0.9]"],
        ['optimizer.top.name="sgd"', "optimizer.momentum=0.9"],
        [*ROUNDS, *PRIVATE, 'optimizer.name="muon"', "optimizer.warmup=10"],
        [*ROUNDS, "optimizer.clip_norm=1.0"],
        [*FROZEN, 'optimizer.top.name="muon"', 'optimizer.schedule="cosine"'],
    ],
)
def test_what_fits_is_taken(path, changes):
    load_run(path, changes)


def test_a_run_without_the_younger_keys_has_the_digest_that_it_had(path):
    """The text is the one before there were betas, warm-up, schedule, clipping and parts."""
    before = '"optimizer":{"lr":0.001,"momentum":0.0,"name":"adam","weight_decay":0.0}'
    config = load_run(path)
    assert before in config.canonical()
    assert '"learning"' not in config.canonical()
    assert load_run(path, ["optimizer.warmup=0", "optimizer.betas=[0.9, 0.999]"]).digest == config.digest


def test_every_younger_key_changes_the_digest(path):
    changes = ["betas=[0.0, 0.999]", "warmup=1", 'schedule="cosine"', "clip_norm=1.0", "top.lr=0.1", "bottom.lr=0.1"]
    changes = [f"optimizer.{change}" for change in changes] + ['run.learning="targets"', "run.passes=2"]
    digests = {load_run(path, [change]).digest for change in changes}
    assert len(digests | {load_run(path).digest}) == len(changes) + 1


def test_the_parts_of_each_protocol(path):
    assert trained_parts(load_run(path)) == ["bottom", "top"]
    assert trained_parts(load_run(path, U)) == ["bottom", "top", "head"]
    assert trained_parts(load_run(path, FROZEN)) == ["top"]
    assert trained_parts(load_run(path, ROUNDS)) == []


def test_gradients_come_late_at_long_windows(path):
    sites = 'run.sites=["a", "b", "c"]'
    assert steps_late(load_run(path, [sites, "run.window=1"])) == {"bottom": 0, "top": 0}
    assert steps_late(load_run(path, [sites, "run.window=10"])) == {"bottom": 9, "top": 0}
    assert steps_late(load_run(path, [*U, sites, "run.window=10"])) == {"bottom": 9, "top": 15, "head": 0}
    assert steps_late(load_run(path, [*U, sites, "run.window=1"])) == {"bottom": 0, "top": 0, "head": 0}
    assert not any(steps_late(load_run(path, [*U, sites, "run.window=10", 'run.learning="targets"'])).values())
    assert steps_late(load_run(path, [*FROZEN, sites, "run.window=10"])) == {"top": 0}
    assert steps_late(load_run(path, ROUNDS)) == {}


def test_which_rules_suit_late_gradients():
    suited = [OptimizerSection(name="muon"), OptimizerSection(betas=(0.0, 0.9)), OptimizerSection(name="sgd")]
    others = [
        OptimizerSection(),
        OptimizerSection(name="adamw"),
        OptimizerSection(betas=(0.9, 0.9)),
        OptimizerSection(name="sgd", momentum=0.5),
    ]
    assert all(map(suits_late, suited))
    assert not any(map(suits_late, others))
