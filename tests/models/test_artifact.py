"""A published model: what is written is read, what was changed is refused, and what a model takes is told by name."""

import hashlib
import json
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import save_file

from nightsplit.shared.errors import ConfigError
from nightsplit.shared.models.artifact import Artifact, Card, SourceCard, read_artifact, write_artifact
from nightsplit.shared.models.hashing import weights_sha256
from nightsplit.shared.models.networks import ct_cnn

BLOCKS = ("block1", "block2", "block3", "block4")


def card_of(tensors: dict[str, torch.Tensor]) -> Card:
    source = SourceCard(
        name="MedNIST", licence="CC BY-SA 4.0", classes=["0", "1", "2"], samples=48, held_out=12, figures={"auc": 0.9}
    )
    return Card(
        name="modalities",
        factory="nightsplit.models:ct_cnn",
        settings={"width": 4, "side": 16, "outputs": 3},
        head="output",
        input_shape=[1, 16, 16],
        sources=[source],
        epochs=2,
        seed=5,
        date="2026-01-31",
        weights_sha256=weights_sha256(tensors),
    )


@pytest.fixture
def published(tmp_path: Path) -> Artifact:
    torch.manual_seed(5)
    tensors = ct_cnn(width=4, side=16, outputs=3).state_dict()
    path = tmp_path / "models" / "modalities.safetensors"
    sha256 = write_artifact(path, card_of(tensors), tensors)
    artifact = read_artifact(path, sha256)
    assert artifact.card == card_of(tensors)
    assert {name: tensor.tolist() for name, tensor in artifact.tensors.items()} == {
        name: tensor.tolist() for name, tensor in tensors.items()
    }
    return artifact


def refused(path: Path, sha256: str | None = None) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        read_artifact(path, sha256)
    return caught.value


def test_the_same_model_is_the_same_file(published: Artifact, tmp_path: Path) -> None:
    again = tmp_path / "again.safetensors"
    assert write_artifact(again, published.card, published.tensors) == published.sha256
    assert again.read_bytes() == published.path.read_bytes()
    assert hashlib.sha256(again.read_bytes()).hexdigest() == published.sha256
    assert [path.name for path in published.path.parent.iterdir()] == ["modalities.safetensors"]


def test_another_head_is_left_as_it_was_made(published: Artifact) -> None:
    model = ct_cnn(width=4, side=16, outputs=1)
    head = model.output[1].weight.detach().clone()
    published.load_into(model)
    taken = [name for name in model.state_dict() if name.startswith(BLOCKS)]
    assert [*model.state_dict()] == [*taken, "output.1.weight", "output.1.bias"]
    for name in taken:
        assert torch.equal(model.state_dict()[name], published.tensors[name])
    assert torch.equal(model.output[1].weight, head)


def test_a_head_of_the_same_shape_is_not_taken_either(published: Artifact) -> None:
    model = ct_cnn(width=4, side=16, outputs=3)
    head = model.output[1].weight.detach().clone()
    published.load_into(model)
    assert torch.equal(model.output[1].weight, head)


def test_a_missing_file(tmp_path: Path) -> None:
    assert refused(tmp_path / "none.safetensors").number == 115


def test_every_flipped_byte_is_noticed(published: Artifact) -> None:
    """Without the hash, too: in the header, in the card and in the weights."""
    content = published.path.read_bytes()
    numbers = set()
    for position in range(0, len(content), 97):
        damaged = bytearray(content)
        damaged[position] ^= 0x41
        published.path.write_bytes(damaged)
        assert refused(published.path, published.sha256).number == 116
        try:
            artifact = read_artifact(published.path)
        except ConfigError as error:
            numbers.add(error.number)
        else:  # a letter of the card's text, which only the hash covers
            assert artifact.card != published.card
            assert weights_sha256(artifact.tensors) == weights_sha256(published.tensors)
    assert numbers == {115}


@pytest.mark.parametrize("length", [0, 7, 300, -1])
def test_a_file_that_was_cut_off(published: Artifact, length: int) -> None:
    published.path.write_bytes(published.path.read_bytes()[:length])
    assert refused(published.path).number == 115


def test_weights_without_a_card(tmp_path: Path) -> None:
    path = tmp_path / "bare.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    assert "without a card" in refused(path).sentence
    save_file({"a": torch.zeros(2)}, path, {"card": json.dumps({"name": "half a card"})})
    assert "without a card" in refused(path).sentence


def test_weights_that_the_card_does_not_mean(published: Artifact, tmp_path: Path) -> None:
    others = {name: tensor + 1 for name, tensor in published.tensors.items()}
    path = tmp_path / "swapped.safetensors"
    write_artifact(path, published.card, others)
    assert "other weights" in refused(path).sentence


def test_the_hash_may_be_written_in_capitals(published: Artifact) -> None:
    assert read_artifact(published.path, published.sha256.upper()).sha256 == published.sha256


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"width": 8, "side": 16}, r"block1\.0\.bias is float32 \(4,\) in the file and float32 \(8,\) in the model"),
        (
            {"channels": 3, "width": 4, "side": 16},
            r"block1\.0\.weight .* \(4, 1, 3, 3\) in the file .* \(4, 3, 3, 3\)",
        ),
    ],
)
def test_another_backbone(published: Artifact, settings: dict[str, int], said: str) -> None:
    model = ct_cnn(**settings)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError, match=said) as caught:
        published.load_into(model)
    assert caught.value.number == 117
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_stage_more_or_less(published: Artifact) -> None:
    model = ct_cnn(width=4, side=16)
    del model.block4
    with pytest.raises(ConfigError, match=r"the model has no block4\.0\.weight"):
        published.load_into(model)
    more = msgspec.structs.replace(published.card, head="block4")
    artifact = Artifact(published.path, published.sha256, more, published.tensors)
    with pytest.raises(ConfigError, match=r"the model has no output\.1\.bias"):
        artifact.load_into(ct_cnn(width=4, side=16)[:5])


def test_another_precision(published: Artifact) -> None:
    with pytest.raises(ConfigError, match=r"float32 .* in the file and float64"):
        published.load_into(ct_cnn(width=4, side=16).double())
