"""What one key of run.toml cannot tell alone."""

import pytest

from nightsplit.shared.errors import ConfigError
from nightsplit.shared.protocols.load import load_run

RUN = """
[run]
id = "a"
protocol = "split_labels"
sites = ["north", "south"]
[model]
factory = "nightsplit.models:mlp"
[task]
kind = "binary"
[data]
features = ["age"]
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(RUN)
    return path


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ('run.sites=["a", "a"]', "run.sites"),
        ('run.sites=["server"]', "run.sites"),
        ('run.protocol="split_x"', "run.protocol"),
        ('run.protocol="split_u"', "model.head_cut"),
        ("data.validation=0.5", "data.test"),
        ('data.scaling="run"', "data.mean"),
        ("data.image_size=8", "data.features"),
        ("data.features=[]", "data.features"),
        ("data.frames=4", "data.frames"),
        ('run.protocol="he_clstm"', "run.protocol"),
        ("data.window=[40, 0]", "data.window"),
        ('data.window="knee"', "data.window"),
    ],
)
def test_keys_that_do_not_fit_together_are_refused_by_name(path, change, key):
    more = ["data.test=0.45"] if "validation" in change else []
    with pytest.raises(ConfigError) as caught:
        load_run(path, [change, *more])
    assert caught.value.number == 103
    assert f": {key}: " in caught.value.sentence


ROUNDS = ['run.protocol="fedavg_transfer"', 'data.scaling="none"']
PRIVATE = ["privacy.epsilon=1.0", "privacy.delta=0.001", "privacy.clip=1.0"]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        (["round.rounds=3"], "round"),
        (PRIVATE, "privacy"),
        (['model.initial="a.safetensors"', 'model.initial_sha256="b"'], "model.initial"),
        (['task.kind="segmentation"'], "task.kind"),
        ([*ROUNDS, 'model.initial="a.safetensors"'], "model.initial_sha256"),
        ([*ROUNDS, 'round.close="quorum"'], "round.reports"),
        ([*ROUNDS, "round.reports=2"], "round.reports"),
        ([*ROUNDS, 'round.close="quorum"', "round.reports=9"], "round.reports"),
        ([*ROUNDS, 'round.close="buffered"', "round.reports=2", 'run.order="strict"'], "run.order"),
        ([*ROUNDS, 'run.bottoms="averaged"', "run.average_every=4"], "run.bottoms"),
        ([*ROUNDS, *PRIVATE, 'data.scaling="site"'], "data.scaling"),
        ([*ROUNDS, 'run.protocol="fedavg_dp_seg"'], "privacy"),
        ([*ROUNDS, 'run.protocol="data_vectors"'], "round.rounds"),
        ([*ROUNDS, 'run.protocol="data_vectors"', "round.rounds=1", 'run.sites=["base"]'], "run.sites"),
    ],
)
def test_what_rounds_need_and_what_only_they_have(path, changes, key):
    with pytest.raises(ConfigError) as caught:
        load_run(path, changes)
    assert caught.value.number == 103
    assert f": {key}: " in caught.value.sentence


def test_a_quorum_is_a_number_of_the_runs_sites(path):
    sites = len(load_run(path).run.sites)
    assert not load_run(path, [f"run.quorum={sites}"]).run.may_exclude
    with pytest.raises(ConfigError) as caught:
        load_run(path, [f"run.quorum={sites + 1}"])
    assert "run.quorum" in caught.value.sentence


def test_averagings_do_not_overlap(path):
    averaged = ['run.bottoms="averaged"', "run.window=4"]
    load_run(path, [*averaged, "run.average_every=4"])
    with pytest.raises(ConfigError) as caught:
        load_run(path, [*averaged, "run.average_every=3"])
    assert "run.average_every" in caught.value.sentence


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("model.settings.width=inf", "model.settings"), ("model.settings.rates=[1.0, nan]", "model.settings"),
        ("model.settings.day=2026-01-31", "model.settings"), ("model.settings.hour=07:00:00", "model.settings"),
        ("run.absence_hours=inf", "run.absence_hours"), ("data.target_mean=-inf", "data.target_mean"),
    ],
)  # fmt: skip
def test_runs_that_differ_have_different_digests(path, change, key):
    """JSON has no such values: it writes null for all numbers that are not finite, and a text for a date."""
    with pytest.raises(ConfigError) as caught:
        load_run(path, [change])
    assert (caught.value.number, f": {key}: " in caught.value.sentence) == (103, True)


def test_a_pair_of_numbers_is_taken(path):
    assert load_run(path, ["data.window=[40.0, 400.0]"]).data.window == (40.0, 400.0)


def test_the_contract_depends_on_every_key_and_on_no_order(path):
    digest = load_run(path).digest
    assert load_run(path, ["run.seed=1"]).digest != digest
    path.write_text(RUN.replace('id = "a"\nprotocol = "split_labels"', 'protocol = "split_labels"\nid = "a"'))
    assert load_run(path).digest == digest


def test_the_shape_of_a_sample(path):
    def shape(*changes):
        return load_run(path, list(changes)).data.input_shape

    assert shape() == (1,)
    assert shape("data.features=[]", "data.image_size=8") == (1, 8, 8)
    assert shape("data.features=[]", "data.image_size=8", "data.frames=5") == (5, 8, 8)
