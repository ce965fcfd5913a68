"""Sequences that are judged as they are read, or made: figures of lung CT, and two events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.accuracy.events import xor_of_events
from nightsplit.shared.config.run import DataSection, ModelSection, RunConfig, RunSection, TaskSection
from nightsplit.site_worker.config import SourceSection
from nightsplit.site_worker.data.dataset import Dataset
from nightsplit.site_worker.data.scaling import scale
from nightsplit.site_worker.data.source import read_splits

FRAMES, SIDE = 5, 32
TEST = 0.3
"""Share of the patients. Schedules were chosen on other divisions, so no patients are needed for validation."""

Simple = Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]]
"""Features of training and test sequences for a logistic regression, by name."""


@dataclass(frozen=True, eq=False)
class Material:
    """Scaled sequences of training and test patients, and facts about them that need no network.

    Where a training patient has several sequences, `simple` tells of one.
    """

    train: Dataset
    test: Dataset
    simple: Simple


def lung_ct(seed: int) -> Material:
    """Images of one figure or one case.

    Raises:
        NightsplitError: the data set is not here.
    """
    source = SourceSection(
        source="images", path="$NIGHTSPLIT_DATA/covid_ct", index="index.csv", label="label_covid", patient="group"
    )
    run = RunConfig(
        run=RunSection(id="sequences", protocol="fedavg_transfer", sites=["all"], seed=seed),
        model=ModelSection(factory="nightsplit.models:clstm"),
        task=TaskSection(kind="binary"),
        data=DataSection(image_size=SIDE, frames=FRAMES, classes=["0", "1"], validation=0.0, test=TEST),
    )
    parts = read_splits(source, run, Path())

    def simple(dataset: Dataset) -> NDArray[np.float64]:
        changes = [sum(not torch.equal(one, other) for one, other in pairwise(sequence)) for sequence in dataset.inputs]
        return np.column_stack([dataset.inputs.mean((1, 2, 3)).numpy(), changes])

    known = {"mean intensity, number of different images": (simple(parts.train), simple(parts.test))}
    parts = scale(parts, run.data)
    return Material(parts.train, parts.test, known)


def xor(seed: int) -> Material:
    """Features without images; of them, no weighted sum tells the label."""

    def draw(number: int) -> Dataset:
        inputs, targets = xor_of_events(4096, FRAMES, 32, number)
        return Dataset(inputs, targets, tuple(map(str, range(len(inputs)))))

    train, test = draw(2 * seed), draw(2 * seed + 1)
    flat = train.inputs.flatten(1).double().numpy(), test.inputs.flatten(1).double().numpy()
    return Material(train, test, {"all features of all frames": flat})
