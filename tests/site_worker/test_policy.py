"""The hospital's policy: of the whole run before it begins, and of each message on its way out."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from nightsplit.shared.config.run import ModelSection, PrivacySection, RunConfig
from nightsplit.shared.errors import ConfigError
from nightsplit.shared.protocols import he_clstm
from nightsplit.shared.protocols.spec import PROTOCOLS, TRAINING, Shapes, sketch, systems
from nightsplit.shared.wire.message import FROM_SITES, SERVER, Header, Kind, Message
from nightsplit.shared.wire.schema import TELLS, Payload, Reveals, ScalarSpec, TensorSpec, contract
from nightsplit.site_worker.config import PolicyConfig
from nightsplit.site_worker.policy import Gate, check_policy, read_policy

FILE = Path("mercy/policy.toml")
ROUNDS = PolicyConfig(allowed=[Reveals.WEIGHTS, Reveals.COUNTS], server_sets_weights=True)


def run(protocol: str = "split_u", **settings: Any) -> RunConfig:
    return msgspec.convert(
        {
            "run": {"id": "night-1", "protocol": protocol, "sites": ["mercy"], **settings},
            "model": {"factory": "nightsplit.models:mlp"},
            "task": {"kind": "binary"},
            "data": {"features": ["a"]},
        },
        RunConfig,
    )


def check(policy: PolicyConfig, config: RunConfig, counts: dict[str, int] | None = None) -> None:
    check_policy(policy, config, sketch(config), FILE, counts)


def refusal(policy: PolicyConfig, config: RunConfig, counts: dict[str, int] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        check(policy, config, counts)
    assert caught.value.number == 108
    return caught.value.sentence


def needed(config: RunConfig) -> set[Reveals]:
    """What a run's messages of sites tell, "nothing" aside."""
    told = (payload.reveals for payload in sketch(config).values() if payload.kind in FROM_SITES)
    return set().union(*told) - {Reveals.NOTHING}


def test_the_default_policy_lets_the_u_shape_pass() -> None:
    check(PolicyConfig(), run("split_u"))


def test_a_site_says_what_all_that_it_sends_tells() -> None:
    with pytest.raises(ValueError, match=r"smashed leaves a site.*: targets"):
        Payload(
            Kind.SMASHED,
            {
                "smashed": TensorSpec(torch.float32, ("batch",), reveals=Reveals.ACTIVATIONS),
                "targets": TensorSpec(torch.float32, ("batch",)),
            },
        )
    with pytest.raises(ValueError, match=r"report leaves a site.*: figures"):
        Payload(Kind.REPORT, scalars={"figures": ScalarSpec(str)})
    with pytest.raises(ValueError, match="cannot set weights"):
        Payload(Kind.REPORT, sets_weights=True)
    with pytest.raises(TypeError, match="no limits"):
        ScalarSpec(str, low=0)
    with pytest.raises(ValueError, match="one payload per kind"):
        contract(Payload(Kind.NOTED), Payload(Kind.NOTED))
    Payload(Kind.CUT_GRADIENT, {"gradient": TensorSpec(torch.float32, ("batch",))})


@pytest.mark.parametrize(
    ("protocol", "told"),
    [
        ("split_labels", {"labels", "activations", "counts"}),
        ("split_u", {"activations", "gradients", "counts"}),
        ("split_frozen", {"labels", "stored_activations", "counts"}),
        ("fedavg_transfer", {"weights", "counts"}),
        ("fedavg_dp_seg", {"weights", "counts"}),
        ("data_vectors", {"weights", "counts"}),
    ],
)
def test_what_the_messages_of_a_system_tell(protocol: str, told: set[str]) -> None:
    assert needed(run(protocol)) == told
    for excluded in told:
        allowed = [Reveals(name) for name in told - {excluded}]
        sentence = refusal(PolicyConfig(allowed=allowed, server_sets_weights=True), run(protocol))
        assert f'needs "{excluded}" in allowed ({TELLS[Reveals(excluded)]}).' in sentence
    check(PolicyConfig(allowed=[Reveals(name) for name in told], server_sets_weights=True), run(protocol))


def test_every_training_system_is_above() -> None:
    (marks,) = (mark for mark in test_what_the_messages_of_a_system_tell.pytestmark if mark.name == "parametrize")
    assert {protocol for protocol, _ in marks.args[1]} == set(systems(*TRAINING))


def test_a_tape_stores_activations() -> None:
    config = run("split_u", tape=True)
    assert needed(config) == {Reveals.STORED_ACTIVATIONS, Reveals.GRADIENTS, Reveals.COUNTS}
    sentence = refusal(PolicyConfig(), config)
    assert '"stored_activations" in allowed' in sentence
    assert "tape = true" in sentence


def test_every_key_is_named() -> None:
    sentence = refusal(PolicyConfig(allowed=[], min_batch=64), run("split_labels", bottoms="averaged", batch_size=16))
    for key in ('"labels"', '"activations"', '"weights"', '"counts"', "server_sets_weights = true", "min_batch = 16"):
        assert key in sentence


def test_weights_from_the_server_need_permission() -> None:
    closed = msgspec.structs.replace(ROUNDS, server_sets_weights=False)
    for protocol in ("fedavg_transfer", "data_vectors"):
        assert "needs server_sets_weights = true (" in refusal(closed, run(protocol))
        check(ROUNDS, run(protocol))


@pytest.mark.parametrize("protocol", ["split_labels", "split_u", "split_frozen"])
def test_without_averaging_no_message_sets_weights(protocol: str) -> None:
    kinds = sketch(run(protocol)).keys()
    assert not {Kind.AVERAGE, Kind.BOTTOM} & kinds
    assert not any(payload.sets_weights for payload in sketch(run(protocol)).values())


def test_averaging_sets_weights() -> None:
    payloads = sketch(run("split_labels", bottoms="averaged"))
    assert [kind for kind, payload in payloads.items() if payload.sets_weights] == [Kind.AVERAGE]
    assert payloads[Kind.BOTTOM].reveals == {Reveals.WEIGHTS}


def test_queries_need_ciphertext() -> None:
    queries = PROTOCOLS["he_clstm"].payloads(run(), Shapes())
    assert queries == he_clstm.SPEC.payloads(run(), Shapes())
    with pytest.raises(ConfigError, match=r'needs "ciphertext" in allowed'):
        check_policy(PolicyConfig(), run(), queries, FILE)
    check_policy(PolicyConfig(allowed=[Reveals.CIPHERTEXT]), run(), queries, FILE)


@pytest.mark.parametrize(("size", "fine"), [(31, False), (32, True)])
def test_smallest_batch(size: int, fine: bool) -> None:
    policy, config = PolicyConfig(min_batch=32), run("split_u", batch_size=size)
    if fine:
        check(policy, config)
    else:
        assert "run.batch_size" in refusal(policy, config)


def test_a_part_below_the_smallest_batch() -> None:
    policy = PolicyConfig(min_batch=8)
    check(policy, run(), {"training": 40, "validation": 8, "test": 0})
    sentence = refusal(policy, run(), {"training": 40, "validation": 8, "test": 3})
    assert "needs min_batch = 3 (all of its test samples; the policy says 8)." in sentence
    check(msgspec.structs.replace(ROUNDS, min_batch=8), run("fedavg_transfer"), {"training": 3})  # no sample leaves


def test_a_limit_of_epsilon_needs_a_private_run() -> None:
    policy = PolicyConfig(max_epsilon=8.0)
    assert "[privacy]" in refusal(policy, run("split_u"))
    private = msgspec.structs.replace(run("split_u"), privacy=PrivacySection(epsilon=1.0, delta=1e-4, clip=1.0))
    check(policy, private)


# ── the gate ────────────────────────────────────────────────────────────────────────────────────


def smashed(rows: int, config: RunConfig) -> tuple[Message, Payload]:
    payload = sketch(config)[Kind.SMASHED]
    tensors = {name: torch.zeros(rows, *spec.shape[1:], dtype=spec.dtype) for name, spec in payload.tensors.items()}
    return Message(Header("night-1", "mercy", SERVER, Kind.SMASHED, 3), tensors), payload


def out(gate: Gate, message: Message, payload: Payload) -> None:
    gate.check_out(message.header, payload, payload.samples({n: tensor.shape for n, tensor in message.tensors.items()}))


def obeys(gate: Gate, payload: Payload) -> bool:
    try:
        gate.check_in(Header("night-1", SERVER, "mercy", payload.kind, 1), payload)
    except ConfigError as error:
        return error.number != 108
    return True


def held(gate: Gate, message: Message, payload: Payload) -> str:
    with pytest.raises(ConfigError) as caught:
        out(gate, message, payload)
    assert caught.value.number == 108
    return caught.value.sentence


def with_factory(name: str) -> RunConfig:
    return msgspec.structs.replace(run(), model=ModelSection(factory=name))


@pytest.mark.parametrize(
    ("packages", "allows"),
    [
        ([], False), (["monai"], True), (["monai.networks"], True), (["monai.networks.nets"], True),
        (["monai.networks.nets.unet"], False), (["monai.net"], False), (["mon"], False), ([""], False), (["*"], False),
        (["torch", "monai"], True),
    ],
)  # fmt: skip
def test_code_of_a_package_is_used_where_the_hospital_lists_it(packages: list[str], allows: bool) -> None:
    config, policy = with_factory("monai.networks.nets:UNet"), PolicyConfig(packages=packages)
    if allows:
        check(policy, config)
    else:
        assert '"monai.networks.nets" in packages' in refusal(policy, config)


def test_a_package_that_is_no_longer_listed_holds_the_next_message(path: Path) -> None:
    path.write_text('packages = ["monai"]')
    config = with_factory("monai.networks.nets:UNet")
    gate = Gate(path, config)
    out(gate, *smashed(8, config))
    path.write_text("packages = []")
    assert '"monai.networks.nets" in packages' in held(gate, *smashed(8, config))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "policy.toml"


def test_a_message_leaves_where_all_that_it_tells_is_allowed(path: Path) -> None:
    path.write_text('allowed = ["activations"]')
    out(Gate(path, run()), *smashed(8, run()))
    message, payload = smashed(8, run("split_labels"))
    sentence = held(Gate(path, run()), message, payload)
    assert 'night-1/mercy/server/smashed/3 needs "labels" in allowed' in sentence


def test_rows_of_the_message_count(path: Path) -> None:
    """16 samples per batch are planned; a message of 9, 8, 3 or 1 does not leave."""
    path.write_text("min_batch = 16")
    config = run(batch_size=16)
    gate = Gate(path, config)
    out(gate, *smashed(16, config))
    for rows in (15, 9, 8, 3, 1):
        assert f"needs min_batch = {rows} (" in held(gate, *smashed(rows, config))
    hello = sketch(config)[Kind.HELLO]
    out(gate, Message(Header("night-1", "mercy", SERVER, Kind.HELLO, 0)), hello)  # nothing of one patient is in it


def test_a_stricter_policy_holds_the_next_message(path: Path) -> None:
    path.write_text('allowed = ["activations", "labels"]')
    config = run("split_labels")
    gate = Gate(path, config)
    out(gate, *smashed(8, config))
    path.write_text('allowed = ["activations"]')
    assert '"labels" in allowed' in held(gate, *smashed(8, config))
    path.write_text('allowed = ["activations", "labels"]')
    out(gate, *smashed(8, config))
    before = path.stat()
    path.write_text('allowed = ["activations", "weights"]'[: before.st_size].ljust(before.st_size))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))  # as large as before
    held(gate, *smashed(8, config))


def test_a_limit_that_the_run_breaks_holds_everything(path: Path) -> None:
    gate = Gate(path, run())
    out(gate, *smashed(8, run()))
    path.write_text("max_epsilon = 1.0")
    assert "[privacy]" in held(gate, *smashed(8, run()))


@pytest.mark.parametrize("damage", ["gone", "wrong", "broken", "unreadable"])
def test_a_policy_that_cannot_be_read_holds_everything(path: Path, damage: str) -> None:
    path.write_text("server_sets_weights = true")
    gate, weights = Gate(path, run()), sketch(run("fedavg_transfer"))[Kind.MODEL]
    out(gate, *smashed(8, run()))
    assert obeys(gate, weights)
    path.unlink()
    if damage == "wrong":
        path.write_text("labels = true")
    elif damage == "broken":
        path.write_text("allowed = [")
    elif damage == "unreadable":
        path.mkdir()
    for _ in range(2):
        assert str(path) in held(gate, *smashed(8, run()))
        assert not obeys(gate, weights)
    if damage == "unreadable":
        path.rmdir()
    path.write_text("min_batch = 2")
    out(gate, *smashed(8, run()))


def test_only_the_hospital_lets_weights_be_set(path: Path) -> None:
    weights, notice = (sketch(run("fedavg_transfer"))[kind] for kind in (Kind.MODEL, Kind.MANIFEST))
    gate = Gate(path, run())
    assert obeys(gate, notice)
    assert not obeys(gate, weights)
    path.write_text("server_sets_weights = true")
    assert obeys(gate, weights)
    path.write_text("server_sets_weights = false")
    assert not obeys(gate, weights)
    assert obeys(gate, replace(weights, sets_weights=False))


def test_without_a_file_the_default_policy_holds(path: Path) -> None:
    assert read_policy(path) == PolicyConfig()
    gate = Gate(path, run())
    out(gate, *smashed(1, run()))
    assert "labels" in held(gate, *smashed(8, run("split_labels")))
