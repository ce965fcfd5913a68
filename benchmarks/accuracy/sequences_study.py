"""The study of `benchmarks.accuracy.sequences`: which networks classify which sequences, and how they are trained."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from benchmarks.accuracy import sequences_hippocampus
from benchmarks.accuracy.plain_clstm import plain_clstm
from benchmarks.accuracy.sequences_hippocampus import PLACES, AreaEncoder, hippocampus, pretrained
from benchmarks.accuracy.sequences_material import FRAMES, SIDE, Material, lung_ct, xor
from benchmarks.speed.encrypted import Setting
from nightsplit.shared.models.sequences import SequenceClassifier, clstm
from nightsplit.shared.storage.files import write_atomic
from nightsplit.shared.storage.tensors import as_safetensors
from nightsplit.site_worker.data.augment import augment
from nightsplit.site_worker.data.dataset import Dataset

SPECIFICITY = 0.9
WEIGHTS = (1.0, 2.0, 4.0)
"""Weight of ill patients in the loss."""
ALL_OR_NOTHING = 30.0
"""A mixture so large that the other evidence has no weight in float32."""

Case = Literal["hippocampus", "lung CT figures", "XOR of two events"]
Figures = dict[str, float]


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One training.

    Attributes:
        case: what is judged.
        network: "polynomial" and "one_shot" are `SequenceClassifier` with and without gates that see h.
        without: what is left out: the state is not asked, the frames' features are not, votes are equal; for
            hippocampus also the masks: the encoder learns from the labels of whole sequences.
        weight: of the ill in the loss.
        seed: gives other test patients, first weights and order.
        quick: a single pass.
    """

    case: Case = "hippocampus"
    network: Literal["plain", "polynomial", "one_shot"] = "polynomial"
    without: Literal["LSTM", "weighted unit", "voting", "masks"] | None = None
    weight: float = 1.0
    seed: int = 1
    quick: bool = False

    @property
    def features_only(self) -> bool:
        """The encoder has learned before, or there is none: a classifier alone is trained."""
        return self.case == "XOR of two events" or (self.case == "hippocampus" and self.without != "masks")


@dataclass(frozen=True)
class Schedule:
    """AdamW with a learning rate that falls to zero as a cosine; the gradient's norm is clipped to 1."""

    passes: int
    rate: float
    decay: float
    batch: int
    augment: tuple[str, ...] = ()


SCHEDULES: Mapping[Case, Schedule] = {
    "hippocampus": Schedule(passes=30, rate=5e-3, decay=0.1, batch=64),
    "lung CT figures": Schedule(passes=30, rate=2e-3, decay=0.1, batch=32, augment=("flip", "shift", "contrast")),
    "XOR of two events": Schedule(passes=60, rate=3e-3, decay=0.0, batch=128),
}
WITHOUT_MASKS = Schedule(passes=16, rate=2e-3, decay=0.1, batch=32, augment=("shift", "contrast"))


def schedule_of(job: Job) -> Schedule:
    """Return the training settings of a job's networks."""
    return WITHOUT_MASKS if job.without == "masks" else SCHEDULES[job.case]


@lru_cache(maxsize=3)
def material(case: Case, seed: int) -> Material:
    """A case's sequences.

    Raises:
        NightsplitError: the data set is not here.
    """
    return {"hippocampus": hippocampus, "lung CT figures": lung_ct, "XOR of two events": xor}[case](seed)


# ── networks ────────────────────────────────────────────────────────────────────────────────────


def network(job: Job) -> nn.Sequential:
    """An untrained network; the part that an ablation leaves out is fixed."""
    torch.manual_seed(job.seed)
    frames, features = FRAMES, 32
    if job.case == "hippocampus":
        frames, features = sequences_hippocampus.FRAMES, AreaEncoder.FEATURES
    if job.network == "plain":
        model = plain_clstm(frames, SIDE, features=features)
    else:
        model = clstm(frames, SIDE, features=features, recurrent=job.network == "polynomial")
    if job.features_only:
        model.encoder = nn.Identity()
    elif job.case == "hippocampus":
        model.encoder = AreaEncoder()
    classifier = model.classifier
    if job.without in ("LSTM", "weighted unit", "voting"):
        assert isinstance(classifier, SequenceClassifier)
        fixed, value = {
            "LSTM": (classifier.mixture, ALL_OR_NOTHING),
            "weighted unit": (classifier.mixture, -ALL_OR_NOTHING),
            "voting": (classifier.votes, 0.0),
        }[job.without]
        nn.init.constant_(fixed.requires_grad_(False), value)
    return model


def train(job: Job, data: Dataset) -> nn.Sequential:
    """A network, trained on the sequences that it is to see: images, or features."""
    model, schedule = network(job), schedule_of(job)
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
        self._encoded = lru_cache(maxsize=3)(self._encode)
        folder.mkdir(parents=True, exist_ok=True)

    def material(self, job: Job) -> Material:
        """Return the inputs of a job's networks: images, or the features that an encoder has made of them."""
        if job.case == "hippocampus" and job.features_only:
            return self._encoded(job.seed, job.quick)
        return material(job.case, job.seed)

    def figures(self, job: Job) -> Figures:
        """On the test sequences."""

        def found() -> Figures:
            model, test = self.trained(job), self.material(job).test
            with torch.no_grad():
                logits = model(test.inputs).squeeze(1)
            return judged(test.targets.numpy(), logits.double().numpy())

        return self._kept(self._path(job, ".json"), found)

    def encrypted(self, job: Job, packing: str) -> Figures:
        """The test features judged as `he_clstm` does it, with a new pair of keys; a quick job asks one ciphertext."""

        def found() -> Figures:
            classifier, test = self.trained(job).classifier, self.material(job).test
            assert isinstance(classifier, SequenceClassifier)
            setting = Setting(classifier.double(), packing)
            asked = min(len(test), setting.capacity) if job.quick else len(test)
            sequences, truth = test.inputs[:asked].double(), test.targets[:asked].numpy()
            with torch.no_grad():
                plain = classifier(sequences).squeeze(1).numpy()
            secret = np.concatenate([setting.judged(part.numpy()) for part in sequences.split(setting.capacity)])
            return {
                "sequences": len(truth),
                "auc": float(roc_auc_score(truth, secret)),
                "auc above plain": float(roc_auc_score(truth, secret) - roc_auc_score(truth, plain)),
                "flipped": int(((secret > 0) != (plain > 0)).sum()),
                "error": float(np.abs(secret - plain).max()),
            }

        return self._kept(self._path(job, f"-{packing}.json"), found)

    def trained(self, job: Job) -> nn.Sequential:
        """The network of a job."""
        path = self._path(job, ".safetensors")
        if not path.exists():
            write_atomic(path, as_safetensors(train(job, self.material(job).train).state_dict()))
        model = network(job)
        model.load_state_dict(load_file(path))
        return model.eval()

    def _encode(self, seed: int, quick: bool) -> Material:
        """The hippocampus as features, and how much of it the encoder found."""
        digest = hashlib.sha256(f"{seed} {quick} {sequences_hippocampus.SCHEDULE}".encode()).hexdigest()
        path = self._folder / f"hippocampus-encoder-{seed}-{digest[:8]}.safetensors"
        if not path.exists():
            write_atomic(path, as_safetensors(pretrained(seed, quick).state_dict()))
        encoder, images = AreaEncoder(), material("hippocampus", seed)
        encoder.load_state_dict(load_file(path))
        with torch.no_grad():
            train, test = (
                Dataset(torch.cat([encoder(some) for some in of.inputs.split(64)]), of.targets, of.patients)
                for of in (images.train, images.test)
            )
        areas = [of.inputs[:, :, :1].atanh().sum(1).double().numpy() for of in (train, test)]
        name = f"area in the {sequences_hippocampus.FRAMES} frames by the encoder"
        return Material(train, test, {**images.simple, name: (areas[0][1 :: len(PLACES)], areas[1])})

    def _path(self, job: Job, suffix: str) -> Path:
        digest = hashlib.sha256(f"{job} {schedule_of(job)}".encode()).hexdigest()
        words = [job.case, job.network, *(["without", job.without] if job.without else []), str(job.seed), digest[:8]]
        return self._folder / ("-".join(words).replace(" ", "-").lower() + suffix)

    @staticmethod
    def _kept(path: Path, found: Callable[[], Figures]) -> Figures:
        if not path.exists():
            write_atomic(path, (json.dumps(found(), indent=1) + "\n").encode())
        known: Figures = json.loads(path.read_text(encoding="utf-8"))
        return known


def judged(truth: NDArray[np.float32], scores: NDArray[np.float64]) -> Figures:
    """AUC, the best sensitivity at a specificity of 0.9, and the figures at thresholds that are known beforehand.

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


def regression(known: Material) -> dict[str, Figures]:
    """Logistic regressions, by the simple features that they are given."""
    found = {}
    for name, (many, few) in known.simple.items():
        truth = known.train.targets.numpy()[:: len(known.train) // len(many)]
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(many, truth)
        found[name] = judged(known.test.targets.numpy(), model.decision_function(few))
    return found
