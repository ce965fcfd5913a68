import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from nightsplit.shared.config.run import ModelSection
from nightsplit.shared.errors import ConfigError
from nightsplit.shared.learning.seeds import seed_for, seeded
from nightsplit.shared.models.networks import ct_cnn, mlp, small_cnn
from nightsplit.shared.models.partition import ModelParts, build, flow_shapes

SMALL = "nightsplit.models:small_cnn"
MLP = {"inputs": 4, "hidden": [8, 6], "outputs": 2}

HERE = Path()
Write = Callable[[str], dict[str, str]]


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes the body of a user's `make` into model.py of the folder of run.toml, and returns the keys of [model]."""
    monkeypatch.chdir(tmp_path)

    def write(body: str) -> dict[str, str]:
        lines = ["from torch import nn", "from nightsplit.models import ModelParts", "def make(width=4):"]
        return keys_of("\n".join([*lines, *(f"    {line}" for line in body.splitlines())]).encode())

    return write


def keys_of(content: bytes) -> dict[str, str]:
    (HERE / "model.py").write_bytes(content)
    return {"factory": "model.py:make", "code_sha256": hashlib.sha256(content).hexdigest()}


def refused(model: ModelSection, number: int, *, with_head: bool = False) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        build(model, 0, HERE, with_head=with_head)
    assert caught.value.number == number
    assert caught.value.remedy.endswith(".")
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("network", "settings", "inputs"),
    [(mlp, MLP, (4,)), (small_cnn, {}, (1, 28, 28)), (ct_cnn, {"width": 4}, (1, 64, 64))],
)
def test_parts_compose_to_the_whole_bit_for_bit(
    network: Callable[..., nn.Sequential], settings: dict[str, object], inputs: tuple[int, ...]
) -> None:
    spec = f"nightsplit.models:{network.__name__}"
    stages = len(network(**settings))
    x = torch.randn(3, *inputs)
    with seeded(seed_for(3, "model")):
        whole = network(**settings).eval()(x)
    for cut in range(1, stages):
        for head_cut in (None, *range(cut + 1, stages)):
            model = ModelSection(factory=spec, settings=settings, cut=cut, head_cut=head_cut)
            try:
                parts = build(model, 3, HERE, with_head=head_cut is not None)
            except ConfigError as error:
                assert "has no weights" in error.sentence  # noqa: PT017  a part is only pooling
                continue
            flow = x
            for part in parts.modules.values():
                flow = part.eval()(flow)
            assert torch.equal(flow, whole)


def test_state_dicts_of_the_parts_are_the_whole_models() -> None:
    parts = build(ModelSection(factory=SMALL, cut=2, head_cut=4), 0, HERE, with_head=True)
    names = [name for part in parts.modules.values() for name in part.state_dict()]
    assert names == list(small_cnn().state_dict())


def test_every_participant_builds_the_same_weights_and_no_generator_moves() -> None:
    model = ModelSection(factory=SMALL)
    before = torch.get_rng_state()
    first, second = build(model, 7, HERE, with_head=False), build(model, 7, HERE, with_head=False)
    other = build(model, 8, HERE, with_head=False)
    assert torch.equal(before, torch.get_rng_state())
    for a, b, c in zip(*(parts.top.parameters() for parts in (first, second, other)), strict=True):
        assert torch.equal(a, b)
        assert a.ndim == 1 or not torch.equal(a, c)  # norms start at one whatever the seed


def test_head_cut_is_ignored_without_a_head() -> None:
    parts = build(ModelSection(factory=SMALL, head_cut=4), 0, HERE, with_head=False)
    assert parts.head is None
    assert list(dict(parts.top.named_children())) == ["block2", "block3", "pool", "output"]


def test_a_factory_beside_the_user(factory: Write) -> None:
    spec = factory("return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 1))")
    path = list(sys.path)
    parts = build(ModelSection(**spec, settings={"width": 5}, cut=2), 0, HERE, with_head=False)
    assert flow_shapes(parts.modules, (3,)) == {"bottom": (5,), "top": (1,)}
    assert sys.path == path


def test_a_factory_may_cut_itself(factory: Write) -> None:
    spec = factory("return ModelParts(nn.Linear(3, width), nn.Linear(width, 2), nn.Linear(2, 1))")
    parts = build(ModelSection(**spec), 0, HERE, with_head=True)
    assert flow_shapes(parts.modules, (3,)) == {"bottom": (4,), "top": (2,), "head": (1,)}


def test_a_repeated_stage_stays_repeated(factory: Write) -> None:
    """An activation without weights may be one object; named_children() would lose its second place."""
    spec = factory("relu = nn.ReLU()\nreturn nn.Sequential(nn.Linear(3, 3), relu, nn.Linear(3, 3), relu)")
    parts = build(ModelSection(**spec, cut=2), 0, HERE, with_head=False)
    assert [len(part) for part in parts.modules.values() if isinstance(part, nn.Sequential)] == [2, 2]


# ------------------------------------------------------------------------------------------- E104


def test_a_package_that_is_absent() -> None:
    error = refused(ModelSection(factory="no_such_module:make"), 104)
    assert "ModuleNotFoundError: No module named 'no_such_module'" in error.sentence


@pytest.mark.usefixtures("factory")
@pytest.mark.parametrize(
    ("text", "said", "line"),
    [
        ("import torch\nraise RuntimeError('no\\nweights')", "RuntimeError: no weights", 2),
        ("x = 1\ny = (", "SyntaxError: '(' was never closed", 2),
        ("import sys\n\nsys.exit(3)", "SystemExit: 3", 3),
    ],
)
def test_a_file_that_fails(text: str, said: str, line: int) -> None:
    model = ModelSection(**keys_of(text.encode()))
    for _ in range(2):
        error = refused(model, 104)
        assert f"{said} ({HERE / 'model.py'}, line {line})" in error.sentence
        assert error.__cause__ is not None


def test_a_misspelt_function_gets_a_line_to_paste() -> None:
    error = refused(ModelSection(factory="nightsplit.models:smal_cnn"), 104)
    assert error.remedy == f'set model.factory = "{SMALL}".'


@pytest.mark.usefixtures("factory")
def test_an_empty_file() -> None:
    assert "define it" in refused(ModelSection(**keys_of(b"")), 104).remedy


def test_settings_that_the_factory_does_not_take() -> None:
    error = refused(ModelSection(factory=SMALL, settings={"depth": 3}), 104)
    assert "unexpected keyword argument 'depth'" in error.sentence
    assert "networks.py, line" in error.sentence
    assert "width: int = 16" in error.remedy


def test_a_factory_that_fails_is_quoted_where_it_failed(factory: Write) -> None:
    spec = factory("if width > 3:\n    nn.Linear('3', width)")
    error = refused(ModelSection(**spec), 104)
    assert "TypeError: " in error.sentence
    assert "model.py, line 5)" in error.sentence  # the user's line, not torch's
    assert isinstance(error.__cause__, TypeError)


def test_a_factory_written_in_c_is_called_without_asking() -> None:
    error = refused(ModelSection(factory="builtins:dict", settings={"a": 1}), 104)
    assert "returned dict, neither" in error.sentence


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return nn.Linear(3, 1)", "returned Linear, neither"),
        ("return None", "returned NoneType, neither"),
        ("return ModelParts(nn.Linear(3, 1), 'top')", "top is of type str"),
        (
            "class Odd(nn.Sequential):\n    def forward(self, x):\n        return x\nreturn Odd()",
            "returned Odd, neither",
        ),
    ],
)
def test_a_factory_that_returns_something_else(factory: Write, body: str, said: str) -> None:
    assert said in refused(ModelSection(**factory(body)), 104).sentence


# ------------------------------------------------------------------------------------------- E105


@pytest.mark.parametrize(
    ("cut", "head_cut", "said", "remedy"),
    [
        (
            5,
            None,
            "nothing is left for the top",
            "set model.cut = 4: 0 block1, 1 block2, 2 block3, 3 pool | 4 output.",
        ),
        (99, None, "nothing is left for the top", "set model.cut = 4: "),
        (
            1,
            5,
            "nothing is left for the head",
            "set model.cut = 1 and model.head_cut = 4: 0 block1 | 1 block2, ",
        ),
        (3, 3, "nothing is left for the top", "set model.cut = 2 and model.head_cut = 3: "),
        (4, 2, "nothing is left for the top", "set model.cut = 2 and model.head_cut = 3: "),
        (3, 4, "the top has no weights, so the server would have nothing to train", "set model.cut = 2 and "),
    ],
)
def test_a_cut_that_leaves_nothing(cut: int, head_cut: int | None, said: str, remedy: str) -> None:
    model = ModelSection(factory=SMALL, cut=cut, head_cut=head_cut)
    error = refused(model, 105, with_head=head_cut is not None)
    assert said in error.sentence
    assert error.remedy.startswith(remedy)


def test_a_head_that_is_not_set() -> None:
    error = refused(ModelSection(factory=SMALL, cut=1), 105, with_head=True)
    assert "needs a head" in error.sentence
    assert error.remedy.startswith("set model.cut = 1 and model.head_cut = 4: ")


def test_a_bottom_that_would_send_the_images_themselves(factory: Write) -> None:
    spec = factory("return nn.Sequential(nn.Flatten(), nn.Linear(9, 4), nn.Linear(4, 1))")
    error = refused(ModelSection(**spec), 105)
    assert "the site would send its data as they are" in error.sentence
    assert error.remedy == "set model.cut = 2: 0 Flatten, 1 Linear | 2 Linear."


@pytest.mark.parametrize(
    "tie",
    ["b = a", "b.weight = a.weight", "b.weight = nn.Parameter(a.weight.data.t())"],
    ids=["module", "parameter", "view"],
)
def test_weights_on_both_sides(factory: Write, tie: str) -> None:
    body = f"a, b = nn.Linear(3, 3), nn.Linear(3, 3)\n{tie}\n"
    spec = factory(body + "return nn.Sequential(a, nn.ReLU(), b, nn.Linear(3, 1))")
    error = refused(ModelSection(**spec), 105)
    assert "bottom and top share weights (0.weight and 2.weight)" in error.sentence
    assert error.remedy.startswith("set model.cut = 3: ")


def test_a_shared_buffer(factory: Write) -> None:
    spec = factory(
        "a = nn.BatchNorm1d(3)\nb = nn.BatchNorm1d(3)\nb.running_mean = a.running_mean\nreturn nn.Sequential(a, b)"
    )
    error = refused(ModelSection(**spec), 105)
    assert "0.running_mean and 1.running_mean" in error.sentence
    assert error.remedy == "give every part a stage with weights that no other part uses."


def test_lazy_modules_start_differently_at_every_participant(factory: Write) -> None:
    spec = factory("return nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(1))")
    assert "lazy" in refused(ModelSection(**spec), 105).sentence


@pytest.mark.parametrize(
    ("body", "with_head", "said"),
    [
        ("return ModelParts(nn.Linear(3, 2), nn.Linear(2, 1))", True, "the ModelParts have none"),
        ("return ModelParts(nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 1))", False, "only split_u"),
        ("a = nn.Linear(3, 3)\nreturn ModelParts(a, nn.Sequential(a, nn.Linear(3, 1)))", False, "share weights"),
        ("return ModelParts(nn.Flatten(), nn.Linear(3, 1))", False, "the bottom has no weights"),
    ],
)
def test_halves_that_do_not_fit_the_run(factory: Write, body: str, with_head: bool, said: str) -> None:
    error = refused(ModelSection(**factory(body)), 105, with_head=with_head)
    assert said in error.sentence
    assert "return ModelParts(bottom=..., top=..." in error.remedy


# ----------------------------------------------------------------------------------------- shapes


def test_shapes_of_the_reference_networks() -> None:
    parts = build(ModelSection(factory=SMALL, head_cut=4), 0, HERE, with_head=True)
    shapes = flow_shapes(parts.modules, (1, 28, 28))
    assert shapes == {"bottom": (16, 14, 14), "top": (64,), "head": (1,)}


def test_a_dry_forward_leaves_no_trace() -> None:
    bottom = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout())
    parts = ModelParts(bottom, nn.Linear(4, 1).eval())
    state = {name: value.clone() for name, value in bottom.state_dict().items()}
    before = torch.get_rng_state()
    flow_shapes(parts.modules, (3,))
    assert torch.equal(before, torch.get_rng_state())
    assert bottom.training
    assert not parts.top.training
    assert all(torch.equal(value, state[name]) for name, value in bottom.state_dict().items())


def test_data_that_the_model_does_not_take() -> None:
    parts = build(ModelSection(factory=SMALL), 0, HERE, with_head=False)
    with pytest.raises(
        ConfigError, match=r"the bottom does not take a sample of shape \(13,\): RuntimeError"
    ) as caught:
        flow_shapes(parts.modules, (13,))
    assert caught.value.number == 104
    assert "model.settings" in caught.value.remedy


class Pair(nn.Linear):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return x, x


class Total(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).sum()


@pytest.mark.parametrize(("bottom", "said"), [(Pair(3, 3), "returns tuple"), (Total(3, 3), r"returns shape \(\)")])
def test_a_part_that_returns_no_row_per_sample(bottom: nn.Module, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        flow_shapes(ModelParts(bottom, nn.Linear(3, 1)).modules, (3,))
    assert caught.value.number == 105
