"""The trainings of `benchmarks.accuracy.federated`: which there are, and how each is carried out.

Three sites that hold lung CTs or chest X-rays. The runs are whole runs with the real roles; model, optimizer and
augmentation are those of examples/fedavg_transfer and examples/radiograph. Inputs are scaled by one mean and one
spread, of the training patients of all sites, so that rows differ in nothing but what they are named after.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch
from msgspec import Struct
from msgspec.structs import replace

from benchmarks.accuracy.divisions import DIVISIONS, IID, divide, keep
from nightsplit.console.demo.baselines import alone, centralized
from nightsplit.console.pretrain import train_first_model
from nightsplit.server_worker.protocols.data_vectors import DataVectorsServer
from nightsplit.shared.config.load import load
from nightsplit.shared.config.run import DataSection, RunConfig
from nightsplit.shared.models.artifact import Artifact, read_artifact
from nightsplit.shared.protocols.build import build_whole_model
from nightsplit.shared.protocols.load import load_run
from nightsplit.simulation.evaluate import evaluate
from nightsplit.simulation.run import simulate
from nightsplit.site_worker.config import SiteConfig
from nightsplit.site_worker.data.dataset import Splits
from nightsplit.site_worker.data.scaling import scale
from nightsplit.site_worker.data.source import read_splits
from nightsplit.site_worker.rounds.trainer import Trainer

EXAMPLES = Path(__file__).parents[2] / "examples"
SITES = ["north", "south", "east"]
CASES = {"lung_ct": "fedavg_transfer", "radiograph": "radiograph"}
"""The example that each case's data and model are of."""
LABELS = {0.1: 2, 0.25: 2, 1.0: 1}
"""Shares of each site's training patients, and passes over them in a round; fewer patients want more steps each."""
SMALL_BATCH = 16
"""Samples per step where a site has a part of its labels."""
PASSES = 20
"""Over each site's training patients, however they are divided into rounds; twice as many over a part of them."""
LOCAL_EPOCHS = (1, 5, 10)
RULES: Mapping[str, dict[str, object]] = {
    "geometric median": {},
    "mean": {"combine": "mean"},
    "median": {"combine": "median"},
    "quorum of 2": {"close": "quorum", "reports": 2},
    "buffered, 2 updates": {"close": "buffered", "reports": 2},
}
"""Keys of [round]. Of three updates a trimmed mean is the median or the mean itself, so it is no row."""
SCRATCH, MEDNIST, XRAY, BOTH = "scratch", "MedNIST", "chest X-ray", "both"
SOURCES = (SCRATCH, MEDNIST, XRAY, BOTH)
"""Data that first weights were trained on."""
BACKBONE = ["block1", "block2", "block3", "block4"]


class Job(Struct, frozen=True, kw_only=True):
    """One training.

    Attributes:
        seed: of the split of the patients, division, first weights and order.
        system: "federated", "centralized", "north alone" (or another site), "data_vectors".
        case: key of `CASES`.
        source: what the first weights learned from, one of `SOURCES`.
        frozen: the backbone keeps its weights.
        labels: share of the training patients that sites have.
        division: key of `DIVISIONS`.
        local_epochs: passes of a round.
        rule: key of `RULES`.
        passes: over the training patients.
        quick: a tenth of the patients.
    """

    seed: int = 1
    system: str = "federated"
    case: str = "lung_ct"
    source: str = SCRATCH
    frozen: bool = False
    labels: float = 1.0
    division: str = IID
    local_epochs: int = 1
    rule: str = "geometric median"
    passes: int = PASSES
    quick: bool = False


TUNED = [Job(source=source) for source in SOURCES]
FROZEN = [Job(source=source, frozen=True) for source in SOURCES if source != SCRATCH]
POOLED = [Job(system="centralized", source=source) for source in (SCRATCH, MEDNIST)]
ALONE = [Job(system=f"{site} alone") for site in SITES]
DIVIDED = {division: Job(division=division) for division in DIVISIONS}
MEETING = {epochs: Job(local_epochs=epochs) for epochs in LOCAL_EPOCHS}
RULED = {rule: Job(rule=rule, labels=0.25) for rule in RULES}
_VECTORS = Job(system="data_vectors", source=MEDNIST)
VECTORS = {
    "lung_ct": _VECTORS,
    "radiograph, 15% of the labels": replace(_VECTORS, case="radiograph", labels=0.15),
    "radiograph, 3%": replace(_VECTORS, case="radiograph", labels=0.03),
}
"""15% of the chest X-rays are about as many as there are CTs."""


# ── stage 1 ─────────────────────────────────────────────────────────────────────────────────────

_PRETRAIN = """\
[pretrain]
name = "source"
output = "model.safetensors"
epochs = {epochs}

[model]
factory = "{factory}"
settings = {{ {settings}, outputs = {outputs} }}

[optimizer]
name = "adamw"
lr = 0.001
weight_decay = 0.01

[data]
image_size = {side}
test = 0.1
augment = ["flip"]
"""
_SOURCES = {
    MEDNIST: """
[[source]]
name = "MedNIST"
licence = "CC BY-SA 4.0"
source = "arrays"
path = "$NIGHTSPLIT_DATA/mednist64/mednist64.npz"
label = "labels"
classes = ["0", "1", "2", "3", "4", "5"]
""",
    XRAY: """
[[source]]
name = "PneumoniaMNIST"
licence = "CC BY 4.0"
source = "arrays"
path = "$NIGHTSPLIT_DATA/pneumoniamnist/pneumoniamnist.npz"
images = "train_images"
label = "train_labels"
classes = ["0", "1"]
""",
}
_OUTPUTS = {MEDNIST: 6, XRAY: 2, BOTH: 8}


def model_of(source: str, config: RunConfig, folder: Path, quick: bool) -> Artifact:
    """The published model of a source for a run's network; made where the folder does not have it yet."""
    sources = _SOURCES[MEDNIST] + _SOURCES[XRAY] if source == BOTH else _SOURCES[source]
    if quick:
        sources = sources.replace("classes =", "share = [0.0, 0.02]\nclasses =")
    settings = ", ".join(f"{key} = {value}" for key, value in config.model.settings.items())
    recipe = sources + _PRETRAIN.format(
        epochs=1 if quick else 4, factory=config.model.factory, settings=settings, outputs=_OUTPUTS[source],
        side=config.data.image_size,
    )  # fmt: skip
    folder = folder / hashlib.sha256(recipe.encode()).hexdigest()[:12]
    output = folder / "model.safetensors"
    if not output.exists():
        folder.mkdir(exist_ok=True)
        (folder / "pretrain.toml").write_text(recipe, encoding="utf-8")
        train_first_model(folder / "pretrain.toml")
    return read_artifact(output)


# ── stage 2 ─────────────────────────────────────────────────────────────────────────────────────


class Study:
    """Carries out jobs.

    Args:
        folder: where models of stage 1 are kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def prepare(self, job: Job) -> tuple[RunConfig, Path]:
        """The job's run, and the folder that its first weights are in."""
        config = _config(job.case)
        local = min(job.local_epochs, job.passes)
        rounds = {"rounds": job.passes // local, "local_epochs": local * LABELS.get(job.labels, 1), "decay": "cosine"}
        rule = RULES[job.rule]
        if "reports" in rule:  # as many updates as with three in a round
            rounds["rounds"] = round(job.passes * len(SITES) / int(str(rule["reports"])))
        run = replace(
            config.run,
            id="study",
            protocol="fedavg_transfer",
            sites=SITES,
            seed=job.seed,
            order="fair" if "close" in rule else "strict",
            batch_size=config.run.batch_size if job.labels == 1 else SMALL_BATCH,
            evaluate_every=job.passes,
        )
        if job.system == "data_vectors":
            run = replace(run, protocol="data_vectors")
            rounds |= {"rounds": 1, "local_epochs": job.passes}
        frozen = BACKBONE if job.frozen else []
        model, base = replace(config.model, initial=None, initial_sha256=None), self._folder
        data = replace(config.data, validation=0.15 if job.system == "data_vectors" else 0.0)
        config = replace(config, run=run, data=data, model=model)
        if job.source != SCRATCH:
            published = model_of(job.source, config, self._folder, job.quick)
            model = replace(model, initial=published.path.name, initial_sha256=published.sha256)
            base = published.path.parent
        section = replace(config.round, **{**rounds, **rule, "freeze": frozen})
        return replace(config, round=section, model=model), base

    def carry_out(self, job: Job) -> dict[str, float]:
        """Train; AUC on the test patients of all sites as one group, by system."""
        torch.set_num_threads(1)
        config, base = self.prepare(job)
        splits = _parts(job, config.data)
        if job.system == "data_vectors":
            return _vectors(config, splits, base)
        if job.system == "centralized":
            figures = centralized(config, splits, base)
        elif job.system == "federated":
            figures = simulate(config, splits, base).evaluate()
        else:
            figures = alone(config, job.system.removesuffix(" alone"), splits, base)
        return {"auc": _auc(figures.pooled["auc"])}


def _vectors(config: RunConfig, splits: Mapping[str, Splits], base: Path) -> dict[str, float]:
    """Hospitals that train alone, and the sum of their changes."""
    server = simulate(config, splits, base).server
    assert isinstance(server, DataVectorsServer)
    assert server.scale is not None
    trainer = Trainer(build_whole_model(config, base).module, config, "cpu")

    def auc(added: torch.Tensor) -> float:
        trainer.load(server.layout.weights(server.published + added))
        return _auc(evaluate(config, splits, lambda site, inputs: trainer.predict(inputs)).pooled["auc"])

    generator = torch.Generator().manual_seed(config.run.seed)
    taus = [server.vectors[site] for site in SITES]
    total = torch.stack(taus).sum(0)
    noise = torch.zeros_like(total)
    for tau in taus:
        direction = torch.randn(tau.shape, generator=generator)
        noise += tau.norm() * direction / direction.norm()
    return {
        **{f"{site} alone": auc(tau) for site, tau in zip(SITES, taus, strict=True)},
        "one-shot mean": auc(total / len(SITES)),
        "sum": auc(total),
        "merged": auc(server.scale * total),
        "random vectors": auc(server.scale * noise),
        "all data": _auc(centralized(config, splits, base).pooled["auc"]),
        "scale": server.scale,
    }


def _auc(value: float | None) -> float:
    assert value is not None, "test patients of all sites are of both classes"
    return value


def _parts(job: Job, data: DataSection) -> dict[str, Splits]:
    """Each site's patients."""
    splits = divide(_whole(job.case, job.seed, job.quick, data.validation), SITES, job.division, job.seed)
    return {
        site: Splits(keep(own.train, job.labels, job.seed), keep(own.validation, job.labels, job.seed), own.test)
        for site, own in splits.items()
    }


@lru_cache(maxsize=2)
def _whole(case: str, seed: int, quick: bool, validation: float) -> Splits:
    """All patients, scaled as the training patients ask for."""
    config = _config(case)
    config = replace(config, run=replace(config.run, seed=seed), data=replace(config.data, validation=validation))
    source = load(EXAMPLES / CASES[case] / "north.toml", SiteConfig).data
    source = replace(source, share=(0.0, 0.1 if quick else 1.0))
    return scale(read_splits(source, config, EXAMPLES), config.data)


def _config(case: str) -> RunConfig:
    return load_run(EXAMPLES / CASES[case] / "run.toml")
