"""The study of `benchmarks.sequences`: which networks judge which sequences, and how they are trained."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from benchmarks.events import xor_of_events
from shared.config import DataSection, RunConfig, RunSection, SourceSection, TaskSection
from shared.config import ModelSection as Model
from shared.models.sequences import SequenceJudge, clstm, plain_clstm
from site_worker.data.augment import augment
from site_worker.data.dataset import Dataset, Parts
from site_worker.data.pixels import resized
from site_worker.data.scaling import scale
from site_worker.data.source import load_dataset, read_parts
from site_worker.data.split import shuffled

FRAMES, SIDE = 5, 32
TEST = 0.3
"""Share of the patients; the schedule was fixed beforehand, so that nobody is needed for validation."""
PLACES = 7
"""Training sequences of a volume: each of its frames is taken at so many places of its part."""
SPECIFICITY = 0.9
WEIGHTS = (1.0, 2.0, 4.0)
"""Of the ill in the loss."""
ALL_OR_NOTHING = 30.0
"""A mixture so large that the other evidence has no weight in float32."""

Case = Literal["hippocampus", "lung CT figures", "XOR of two events"]
Figures = dict[str, float]
Simple = Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]]
"""Features of training and test sequences for a logistic regression, by name."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One training.

    Attributes:
        case: what is judged.
        network: "polynomial" and "one_shot" are `SequenceJudge` with and without gates that see h.
        without: what is left out: the state is not asked, the frames' features are not, votes are equal.
        weight: of the ill in the loss.
        seed: gives other test patients, first weights and order.
        quick: a single pass.
    """

    case: Case = "hippocampus"
    network: Literal["plain", "polynomial", "one_shot"] = "polynomial"
    without: Literal["LSTM", "weighted unit", "voting"] | None = None
    weight: float = 1.0
    seed: int = 1
    quick: bool = False


@dataclass(frozen=True)
class Schedule:
    """AdamW with a learning rate that falls to zero as a cosine; the gradient's norm is clipped to 1."""

    passes: int
    rate: float
    decay: float
    batch: int
    augment: tuple[str, ...] = ()


SCHEDULES: Mapping[Case, Schedule] = {
    "hippocampus": Schedule(passes=20, rate=2e-3, decay=0.1, batch=64, augment=("flip", "shift", "contrast")),
    "lung CT figures": Schedule(passes=30, rate=2e-3, decay=0.1, batch=32, augment=("flip", "shift", "contrast")),
    "XOR of two events": Schedule(passes=60, rate=3e-3, decay=0.0, batch=128),
}


@dataclass(frozen=True, eq=False)
class Material:
    """Scaled sequences of training and test patients, and what needs no network to be known of them."""

    train: Dataset
    test: Dataset
    simple: Simple


# ── data ────────────────────────────────────────────────────────────────────────────────────────


@lru_cache(maxsize=3)
def material(case: Case, seed: int) -> Material:
    """A case's sequences.

    Raises:
        NightsplitError: the data set is not here.
    """
    return {"hippocampus": _hippocampus, "lung CT figures": _figures, "XOR of two events": _xor}[case](seed)


@dataclass(frozen=True, eq=False)
class Volume:
    """Slices (n, side, side), how much of each is hippocampus by the expert's mask (n,), in mm^3, and the extents
    of what was scanned, in mm.
    """

    slices: torch.Tensor
    areas: torch.Tensor
    extents: tuple[int, int]

    def frames(self, place: float) -> list[int]:
        """The slices at a place of each part, 0 to 1; 0.5 is what `data.frames` takes."""
        return [int((i + place) * len(self.slices) / FRAMES) for i in range(FRAMES)]

    @property
    def simple(self) -> list[float]:
        """Mean intensity, number of slices and extents: what a label should not follow from."""
        return [self.slices.mean().item(), len(self.slices), *self.extents, len(self.slices) * math.prod(self.extents)]


def _hippocampus(seed: int) -> Material:
    volumes = _volumes()
    names = shuffled(volumes, seed)
    test, train = names[: round(TEST * len(names))], names[round(TEST * len(names)) :]
    median = float(np.median([volumes[name].areas.sum() for name in train]))

    def sequences(chosen: list[str], places: list[float]) -> Dataset:
        rows = [(volumes[name], name, place) for name in chosen for place in places]
        large = torch.tensor([float(volume.areas.sum() > median) for volume, _, _ in rows])
        inputs = torch.stack([volume.slices[volume.frames(place)] for volume, _, place in rows])
        return Dataset(inputs, large, tuple(name for _, name, _ in rows))

    def simple(features: Callable[[Volume], list[float]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        few, many = (np.array([features(volumes[name]) for name in chosen]) for chosen in (test, train))
        return many, few

    def expert(volume: Volume) -> list[float]:
        return [volume.areas[volume.frames(0.5)].sum().item()]

    train_set = sequences(train, [(place + 0.5) / PLACES for place in range(PLACES)])
    parts = scale(Parts(train_set, train_set.select([]), sequences(test, [0.5])), DataSection())
    return Material(
        parts.train,
        parts.test,
        {
            "mean intensity, number of slices": simple(lambda volume: volume.simple[:2]),
            "the same and the extents of the scan": simple(lambda volume: volume.simple),
            f"area in the {FRAMES} frames by the expert's mask": simple(expert),
            "the same times the number of slices": simple(lambda v: [expert(v)[0] * len(v.slices)]),
        },
    )


def _volumes() -> dict[str, Volume]:
    source = SourceSection(
        source="arrays", path="$NIGHTSPLIT_DATA/hippocampus_msd/hippocampus_2d.npz", masks="masks", patient="volume"
    )
    whole = load_dataset(source, DataSection(image_size=64), TaskSection(kind="segmentation"), Path())
    patients = np.array(whole.patients)
    volumes = {}
    for name in dict.fromkeys(whole.patients):
        rows = torch.from_numpy(np.flatnonzero(patients == name))
        images = whole.inputs[rows]
        seen = images.amax(0)[0] > 0
        extents = int(seen.any(1).sum()), int(seen.any(0).sum())
        volumes[name] = Volume(resized(images, SIDE).squeeze(1), whole.targets[rows].sum((1, 2)), extents)
    return volumes


def _figures(seed: int) -> Material:
    source = SourceSection(
        source="images", path="$NIGHTSPLIT_DATA/covid_ct", index="index.csv", label="label_covid", patient="group"
    )
    run = RunConfig(
        run=RunSection(id="sequences", protocol="fedavg_transfer", sites=["all"], seed=seed),
        model=Model(factory="shared.models.sequences:clstm"),
        task=TaskSection(kind="binary"),
        data=DataSection(image_size=SIDE, frames=FRAMES, classes=["0", "1"], validation=0.0, test=TEST),
    )
    parts = read_parts(source, run, Path())

    def simple(dataset: Dataset) -> NDArray[np.float64]:
        changes = [sum(not torch.equal(one, other) for one, other in pairwise(sequence)) for sequence in dataset.inputs]
        return np.column_stack([dataset.inputs.mean((1, 2, 3)).numpy(), changes])

    known = {"mean intensity, number of different images": (simple(parts.train), simple(parts.test))}
    parts = scale(parts, run.data)
    return Material(parts.train, parts.test, known)


def _xor(seed: int) -> Material:
    def draw(number: int) -> Dataset:
        inputs, targets = xor_of_events(4096, FRAMES, 32, number)
        return Dataset(inputs, targets, tuple(map(str, range(len(inputs)))))

    train, test = draw(2 * seed), draw(2 * seed + 1)
    flat = train.inputs.flatten(1).double().numpy(), test.inputs.flatten(1).double().numpy()
    return Material(train, test, {"all features of all frames": flat})


# ── networks ────────────────────────────────────────────────────────────────────────────────────


def network(job: Job) -> nn.Sequential:
    """Untrained; what an ablation leaves out is fixed and not trained."""
    torch.manual_seed(job.seed)
    if job.network == "plain":
        model = plain_clstm(FRAMES, SIDE)
    else:
        model = clstm(FRAMES, SIDE, recurrent=job.network == "polynomial")
    if job.case == "XOR of two events":
        model.encoder = nn.Identity()  # its sequences are features already
    judge = model.judge
    if job.without is not None:
        assert isinstance(judge, SequenceJudge)
        fixed, value = {
            "LSTM": (judge.mixture, ALL_OR_NOTHING),
            "weighted unit": (judge.mixture, -ALL_OR_NOTHING),
            "voting": (judge.votes, 0.0),
        }[job.without]
        nn.init.constant_(fixed.requires_grad_(False), value)
    return model


def train(job: Job) -> nn.Sequential:
    """A network, trained on the training sequences."""
    data, schedule = material(job.case, job.seed).train, SCHEDULES[job.case]
    model = network(job)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, schedule.rate, weight_decay=schedule.decay)
    passes = 1 if job.quick else schedule.passes
    steps = passes * math.ceil(len(data) / schedule.batch)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    chance = torch.Generator().manual_seed(job.seed)
    weight = torch.tensor(job.weight)
    for _ in range(passes):
        for rows in torch.split(torch.randperm(len(data), generator=chance), schedule.batch):
            inputs = augment(data.inputs[rows], schedule.augment, chance) if schedule.augment else data.inputs[rows]
            loss = binary_cross_entropy_with_logits(model(inputs).squeeze(1), data.targets[rows], pos_weight=weight)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            falling.step()
    return model.eval()


# ── figures ─────────────────────────────────────────────────────────────────────────────────────


class Study:
    """Trains, unless the same was trained before.

    Args:
        folder: of figures and weights. Both are kept by job and schedule, and not by the code of the networks.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def figures(self, job: Job) -> Figures:
        """On the test sequences."""
        path = self._path(job, ".json")
        if not path.exists():
            model, test = self.trained(job), material(job.case, job.seed).test
            with torch.no_grad():
                logits = model(test.inputs).squeeze(1)
            found = judged(test.targets.numpy(), logits.double().numpy())
            draft = path.with_suffix(".draft")
            draft.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            draft.replace(path)
        known: Figures = json.loads(path.read_text(encoding="utf-8"))
        return known

    def trained(self, job: Job) -> nn.Sequential:
        """The network of a job."""
        path = self._path(job, ".safetensors")
        if not path.exists():
            draft = path.with_suffix(".draft")
            save_file(train(job).state_dict(), draft)
            draft.replace(path)
        model = network(job)
        model.load_state_dict(load_file(path))
        return model.eval()

    def _path(self, job: Job, suffix: str) -> Path:
        digest = hashlib.sha256(f"{job} {SCHEDULES[job.case]}".encode()).hexdigest()
        words = [job.case, job.network, *(["without", job.without] if job.without else []), str(job.seed), digest[:8]]
        return self._folder / ("-".join(words).replace(" ", "-").lower() + suffix)


def judged(truth: NDArray[np.float32], scores: NDArray[np.float64]) -> Figures:
    """AUC, the best sensitivity at a specificity of 0.9, and what thresholds give that are known beforehand.

    A threshold of -log w on logits finds ill whom the network thinks ill with a probability above 1 / (1 + w).
    """
    false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
    found = {
        "auc": float(roc_auc_score(truth, scores)),
        "sensitivity": float(true[false <= 1 - SPECIFICITY + 1e-9].max()),
    }
    for weight in WEIGHTS:
        called = scores > -math.log(weight)
        found[f"sensitivity at {weight:g}"] = float(called[truth == 1].mean())
        found[f"specificity at {weight:g}"] = float(1 - called[truth == 0].mean())
    found["balanced accuracy"] = (found["sensitivity at 1"] + found["specificity at 1"]) / 2
    return found


def regression(case: Case, seed: int) -> dict[str, Figures]:
    """Logistic regressions on simple features, by what they see."""
    known = material(case, seed)
    truth = known.train.targets.numpy()[:: PLACES if case == "hippocampus" else 1]
    found = {}
    for name, (many, few) in known.simple.items():
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(many, truth)
        found[name] = judged(known.test.targets.numpy(), model.decision_function(few))
    return found
