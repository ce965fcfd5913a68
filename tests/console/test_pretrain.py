"""Stage 1: from public images to a model file that stage 2 begins from."""

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from nightsplit.console.cli import run
from nightsplit.shared.config.run import ModelSection
from nightsplit.shared.models.artifact import read_artifact
from nightsplit.shared.models.factory import make

PRETRAIN = """
[pretrain]
name = "stripes"
output = "models/stripes.safetensors"
seed = 4
epochs = 6
batch_size = 16

[model]
factory = "nightsplit.models:small_cnn"
settings = { width = 4, outputs = 5 }

[optimizer]
name = "adamw"
lr = 0.01

[data]
image_size = 12
test = 0.25
augment = ["flip"]

[[source]]
name = "Stripes"
licence = "CC0"
source = "arrays"
path = "stripes.npz"
classes = ["across", "down"]

[[source]]
name = "Shades"
source = "arrays"
path = "shades.npz"
classes = ["0", "1", "2"]
"""


def write_sources(folder: Path) -> None:
    """Stripes in two directions, and three shades of noise."""
    random = np.random.default_rng(0)
    noise = random.integers(0, 40, (160, 12, 12))
    stripes = np.tile(np.array([200, 20] * 6), (12, 1))
    down = np.arange(80) % 2
    images = noise[:80] + np.where(down[:, None, None] == 1, stripes, stripes.T)
    np.savez(folder / "stripes.npz", images=images.astype(np.uint8), label=np.where(down == 1, "down", "across"))
    shade = np.arange(80) % 3
    np.savez(folder / "shades.npz", images=(noise[80:] * (1 + 2 * shade)[:, None, None]).astype(np.uint8), label=shade)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    write_sources(tmp_path)
    (tmp_path / "pretrain.toml").write_text(PRETRAIN, encoding="utf-8")
    return tmp_path


def change(study: Path, old: str, new: str) -> None:
    assert old in PRETRAIN
    (study / "pretrain.toml").write_text(PRETRAIN.replace(old, new), encoding="utf-8")


def test_a_model_and_its_card(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pretrain", str(study / "pretrain.toml")]) == 0
    out = capsys.readouterr().out
    path = study / "models" / "stripes.safetensors"
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert out.endswith(f'{path}\ninitial_sha256 = "{sha256}"\n')
    assert "epoch 6 of 6: loss" in out

    artifact = read_artifact(path, sha256)
    card = artifact.card
    assert (card.name, card.head, card.input_shape, card.epochs, card.seed) == ("stripes", "output", [1, 12, 12], 6, 4)
    stripes, shades = card.sources
    assert (stripes.name, stripes.licence, stripes.classes) == ("Stripes", "CC0", ["across", "down"])
    assert (shades.name, shades.licence, shades.classes) == ("Shades", None, ["0", "1", "2"])
    assert [(source.samples, source.held_out) for source in card.sources] == [(60, 20), (60, 20)]
    # It has learned, and each source is judged among its own classes.
    assert (stripes.figures["auc"] or 0) > 0.95
    assert (shades.figures["balanced_accuracy"] or 0) > 0.6

    # Stage 2: the same network for another task begins from it.
    target = make(ModelSection(factory=card.factory, settings={**card.settings, "outputs": 1}), 9, Path())
    assert isinstance(target, torch.nn.Module)
    fresh = target.state_dict()
    head = {name: weight.clone() for name, weight in fresh.items() if name.startswith("output.")}
    artifact.load_into(target)
    assert all(torch.equal(fresh[name], {**artifact.tensors, **head}[name]) for name in fresh)


def test_the_same_file_gives_the_same_weights(study: Path) -> None:
    prints = []
    for _ in range(2):
        assert run(["pretrain", str(study / "pretrain.toml")]) == 0
        prints.append(read_artifact(study / "models" / "stripes.safetensors").card.weights_sha256)
    change(study, "seed = 4", "seed = 5")
    assert run(["pretrain", str(study / "pretrain.toml")]) == 0
    prints.append(read_artifact(study / "models" / "stripes.safetensors").card.weights_sha256)
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("outputs = 5", "outputs = 6", "E105 .*ends in shape \\(6,\\) per sample, multiclass needs \\(5,\\)"),
        ('classes = ["0", "1", "2"]', 'classes = ["0"]', "E103 .*two classes or more"),
        ('classes = ["0", "1", "2"]', 'classes = ["0", "1", "3"]', "E403 .*shades.npz"),
        ("test = 0.25", 'test = 0.25\nclasses = ["a", "b"]', "E103 .*data.classes"),
        ("epochs = 6", 'epochs = 6\nhead = "top"', "E103 .*no weights under 'top'.*output.1.bias"),
        ("lr = 0.01", "lr = 1e30", "E603"),
        ("lr = 0.01", "lr = 0.01\ntop = { lr = 0.1 }", "E103 .*optimizer.top: .*trains the whole model"),
        ("lr = 0.01", 'lr = 0.01\nschedule = "cosine"', "E103 .*optimizer.schedule"),
        ("shades.npz", "absent.npz", "E401 .*absent.npz"),
    ],
)
def test_what_is_refused(study: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, said: str) -> None:
    change(study, old, new)
    assert run(["pretrain", str(study / "pretrain.toml")]) == 1
    error = capsys.readouterr().err
    assert re.search(said, error), error
    assert not (study / "models").exists()
