from pathlib import Path
from typing import Any

import msgspec
import pytest

from nightsplit.shared.config.run import PrivacySection, RunConfig
from nightsplit.shared.errors import ConfigError
from nightsplit.site_worker.config import PolicyConfig
from nightsplit.site_worker.policy import check_policy

FILE = Path("mercy/policy.toml")
OPEN = PolicyConfig(labels=True, stored_activations=True, bottom_weights=True)


def run(protocol: str, **settings: Any) -> RunConfig:
    return msgspec.convert(
        {
            "run": {"id": "night-1", "protocol": protocol, "sites": ["mercy"], **settings},
            "model": {"factory": "x:y"},
            "task": {"kind": "binary"},
        },
        RunConfig,
    )


def refusal(policy: PolicyConfig, config: RunConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        check_policy(policy, config, FILE)
    assert caught.value.number == 108
    assert str(FILE) in caught.value.sentence
    return caught.value.sentence


def test_default_policy_lets_the_u_shape_pass() -> None:
    check_policy(PolicyConfig(), run("split_u"), FILE)


def test_open_policy_lets_all_pass() -> None:
    for protocol in ("split_labels", "split_frozen", "split_u"):
        check_policy(OPEN, run(protocol, bottoms="averaged"), FILE)


def test_labels() -> None:
    sentence = refusal(PolicyConfig(), run("split_labels"))
    assert "labels = true" in sentence
    assert "stored_activations" not in sentence
    check_policy(PolicyConfig(labels=True), run("split_labels"), FILE)


def test_every_key_is_named() -> None:
    sentence = refusal(PolicyConfig(min_batch=64), run("split_frozen", bottoms="averaged", batch_size=16))
    for key in ("labels = true", "stored_activations = true", "bottom_weights = true", "min_batch = 16"):
        assert key in sentence


@pytest.mark.parametrize(("size", "fine"), [(31, False), (32, True)])
def test_smallest_batch(size: int, fine: bool) -> None:
    policy, config = PolicyConfig(min_batch=32), run("split_u", batch_size=size)
    if fine:
        check_policy(policy, config, FILE)
    else:
        assert "batch_size" in refusal(policy, config)


def test_a_limit_of_epsilon_needs_a_private_run() -> None:
    policy = PolicyConfig(max_epsilon=8.0)
    assert "[privacy]" in refusal(policy, run("split_u"))
    config = run("split_u")
    private = msgspec.structs.replace(config, privacy=PrivacySection(epsilon=1.0, delta=1e-4, clip=1.0))
    check_policy(policy, private, FILE)
