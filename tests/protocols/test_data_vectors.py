"""Vectors of sites that trained apart: what they are, how they are added, and what a merge does with them."""

import pytest
import torch
from safetensors.torch import load_file

from nightsplit.console.cli import run
from nightsplit.server_worker.published_vectors import read_vector, sum_vectors
from nightsplit.shared.engine.order import Exclude
from nightsplit.shared.errors import ConfigError
from nightsplit.shared.learning.metrics import score, typical
from nightsplit.shared.protocols.data_vectors import SCALES
from nightsplit.shared.storage.files import write_atomic
from nightsplit.shared.storage.tensors import as_safetensors
from nightsplit.shared.wire.message import SERVER
from tests.harness.night import Night, tiny_rounds
from tests.protocols.test_rounds import SITES, begun, rest


def test_vectors_are_what_each_site_would_reach_alone_and_the_sum_is_scaled_by_validation(tmp_path):
    config = tiny_rounds(protocol="data_vectors", local_epochs=3)
    night = Night(config, tmp_path).run()
    server = night.roles[SERVER]
    assert set(server.vectors) == set(SITES)
    history = server.evaluation.history
    assert [entry["epoch"] for entry in history] == list(range(1, len(SCALES) + 1))
    best = max(
        history, key=lambda entry: score(config.task, typical([s["validation"] for s in entry["sites"].values()]))
    )
    assert server.scale == SCALES[best["epoch"] - 1]
    where = ~server.layout.statistics
    expected = server.published + server.scale * sum_vectors(server.vectors)[0]
    torch.testing.assert_close(server.merged()[where], expected[where])
    assert torch.equal(server.layout.vector(night.roles["north"].model()["model"])[where], server.merged()[where])


def test_a_sum_does_not_depend_on_who_came_first(tmp_path):
    """In fair order, whoever is first: to the bit the same, and what comes again changes nothing."""
    ends = set()
    for number, names in enumerate([SITES, SITES[::-1], ("south", "east", "north")]):
        night = Night(tiny_rounds(protocol="data_vectors", order="fair"), tmp_path / str(number))
        night.start(SERVER)
        for name in names:
            night.start(name)
            rest(night, [SERVER, name], turns=100)
        rest(night, [SERVER, *names], turns=500)
        assert SERVER in night.finished
        ends.add(night.fingerprint())
    assert len(ends) == 1


def test_a_vector_that_comes_too_late_is_published_beside_the_merge(tmp_path):
    config = tiny_rounds(protocol="data_vectors", order="fair", close="quorum", reports=2)
    night = begun(config, tmp_path, (SERVER, "north", "south"))
    rest(night, [SERVER, "north", "south"])
    merged = night.roles[SERVER].vector
    night.start("east")
    rest(night, [SERVER, *SITES], turns=1000)
    assert SERVER in night.finished
    assert torch.equal(night.roles[SERVER].vector, merged)
    assert set(night.roles[SERVER].vectors) == set(SITES)


def test_statistics_of_a_merge_are_measured_anew_and_pooled(tmp_path):
    night = Night(tiny_rounds(protocol="data_vectors"), tmp_path).run()
    server, model = night.roles[SERVER], night.roles["north"].model()["model"]
    parts = [night.roles[site].batches.train.inputs @ model["0.weight"].T + model["0.bias"] for site in SITES]
    weights = torch.tensor([24.0, 24.0, 12.0])[:, None]  # north has 40, and counts as many as the median
    mean, square = ((weights * torch.stack([h(part) for part in parts])).sum(0) / 60 for h in (_mean, _square))
    torch.testing.assert_close(server.best_weights["1.running_mean"], mean, rtol=0, atol=1e-4)
    # torch estimates each site's variance without bias, with n - 1
    torch.testing.assert_close(server.best_weights["1.running_var"], square - mean**2, rtol=0.1, atol=1e-3)


def _mean(part):
    return part.mean(0)


def _square(part):
    return (part**2).mean(0)


def test_published_vectors_are_merged_again_with_a_site_more_or_one_less(tmp_path, capsys):
    """To the bit what the run would have added up, whoever is added when; and another theta_pre is refused."""
    everybody = Night(tiny_rounds(protocol="data_vectors", statistics="local"), tmp_path / "all").run()
    server = everybody.roles[SERVER]
    server.publish(tmp_path)
    files = {site: tmp_path / "vectors" / f"{site}.safetensors" for site in SITES}

    def merged(*arguments):
        output = tmp_path / "merged.safetensors"
        assert run(["merge", str(tmp_path), "--output", str(output), *map(str, arguments)]) == 0
        return load_file(output)

    whole = merged()
    assert torch.equal(server.layout.vector(whole), server.merged())
    expected = server.published + 0.5 * sum(server.vectors[site] for site in ("east", "north"))
    assert torch.equal(server.layout.vector(merged("--without", "south", "--scale", 0.5)), expected)

    late = files["south"].rename(tmp_path / "late.safetensors")
    again = merged("--with", late, "--with", late)
    assert all(torch.equal(again[name], whole[name]) for name in whole)

    capsys.readouterr()
    others = {"seed": 4}, {"freeze": ["0"]}
    for changed, number in zip(others, ("E116", "E117"), strict=True):
        night = Night(tiny_rounds(protocol="data_vectors", statistics="local", **changed), tmp_path / number).run()
        night.roles[SERVER].publish(tmp_path / number)
        stranger = tmp_path / number / "vectors" / "north.safetensors"
        assert run(["merge", str(tmp_path), "--output", str(tmp_path / "no"), "--with", str(stranger)]) == 1
        assert capsys.readouterr().err.startswith(number)
    assert run(["merge", str(tmp_path), "--output", str(tmp_path / "no"), "--without", "west"]) == 1
    assert capsys.readouterr().err.startswith("E103")
    assert not (tmp_path / "no").exists()


FACTS = {"shapes": '{"w": [2, 2]}', "buffers": "[]", "base_sha256": "0", "name": "north"}
LIES = {
    "too short": ({}, torch.zeros(3)), "not a vector": ({}, torch.zeros(2, 2)),
    "another type": ({}, torch.zeros(4).half()),
    "not finite": ({}, torch.full((4,), float("nan"))), "no shape": ({"shapes": '{"w": 4}'}, torch.zeros(4)),
    "negative": ({"shapes": '{"w": [-2, -2]}'}, torch.zeros(4)),
    "enormous": ({"shapes": '{"w": [4, 1e300]}'}, torch.zeros(4)),
    "a list": ({"shapes": "[4]"}, torch.zeros(4)), "nested": ({"shapes": "[" * 100_000}, torch.zeros(4)),
    "no names": ({"buffers": "[[]]"}, torch.zeros(4)), "a scale": ({"scale": "nan"}, torch.zeros(4)),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_f6_a_vector_that_lies_about_its_shapes(lie, tmp_path):
    facts, values = LIES[lie]
    path = tmp_path / "north.safetensors"
    write_atomic(path, as_safetensors({"vector": torch.zeros(4)}, FACTS))
    assert read_vector(path).shapes == {"w": (2, 2)}
    write_atomic(path, as_safetensors({"vector": values}, {**FACTS, **facts}))
    with pytest.raises(ConfigError, match="E115"):
        read_vector(path)


def test_part_of_a_vector_does_not_count(tmp_path):
    """A site that left between two slices of its vector."""
    config = tiny_rounds(protocol="data_vectors", quorum=2)
    night = Night(config, tmp_path)
    gone = []
    night.decide = lambda: Exclude("east") if gone and "east" not in night.server.excluded else None
    for name in night.workers:
        night.start(name)
    while night.roles["east"].next_seq < 2:
        rest(night, [SERVER, *SITES], turns=1)
    night.kill("east")
    rest(night, [SERVER, "north", "south"], turns=500)
    assert night.roles[SERVER].applied["east"] == 1
    gone.append(True)
    rest(night, [SERVER, "north", "south"], turns=2000)
    server = night.roles[SERVER]
    assert SERVER in night.finished
    assert set(server.vectors) == {"north", "south"}
    torch.testing.assert_close(server.vector, server.published + sum(server.vectors.values()))
