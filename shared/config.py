"""The files a user writes, as frozen objects: run.toml, site.toml, server.toml, policy.toml.

`nightsplit.shared.config_file` reads them. All participants of a run hold the same run.toml; its `contract` is
what they compare.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from nightsplit.shared.credentials import Credentials

Positive = Annotated[int, Meta(ge=1)]
Natural = Annotated[int, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0.0, lt=1.0)]
Name = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
Codec = Literal["fp32", "fp16", "bf16", "int8"]


class _Section(Struct, frozen=True, forbid_unknown_fields=True):
    """A table of a TOML file: unknown keys are refused."""


class RunSection(_Section, frozen=True, kw_only=True):
    """[run]: what is trained, by whom, in which order.

    Attributes:
        id: name of the run; part of every queue name.
        protocol: one of `nightsplit.shared.protocols.PROTOCOLS`.
        sites: names of the sites that take part.
        seed: every random choice of the run derives from it.
        order: "strict", a fixed function of site and seq, or "fair", weighted round robin over what arrived.
        window: smashed batches a site may have unanswered; 1 is synchronous training.
        epochs: passes over each site's training data (split_frozen: over the stored activations).
        batch_size: samples per smashed batch.
        evaluate_every: epochs between evaluations on held-out patients.
        patience: evaluations without improvement before the run stops early; 0 never stops early.
        bottoms: "independent", or "averaged" over sites every `average_every` training batches.
        export_top: send the server's half of the best model to the sites at the end.
        quorum: sites that must stay; the run goes on without others that fall silent. None: all must stay.
        absence_hours: how long a site that the run waits for may be silent before it is left out.
        tape: the server keeps every message that it receives, for `nightsplit replay`.
    """

    id: Name
    protocol: str
    sites: Annotated[list[Name], Meta(min_length=1)]
    seed: Natural = 0
    order: Literal["strict", "fair"] = "fair"
    window: Positive = 4
    epochs: Positive = 10
    batch_size: Positive = 32
    evaluate_every: Positive = 1
    patience: Natural = 0
    bottoms: Literal["independent", "averaged"] = "independent"
    average_every: Positive = 8
    export_top: bool = False
    quorum: Positive | None = None
    absence_hours: Annotated[float, Meta(gt=0)] = 72.0
    tape: bool = False

    @property
    def may_leave_out(self) -> bool:
        """Whether the run may go on without a site."""
        return self.quorum is not None and self.quorum < len(self.sites)


class ModelSection(_Section, frozen=True, kw_only=True):
    """[model]: a factory and where its model is cut.

    Attributes:
        factory: "package.module:function"; called with `settings`, returns `nn.Sequential` or `Halves`.
        settings: keyword arguments of the factory.
        initial: a published model file whose weights the run begins with, beside run.toml; None for fresh ones.
        initial_sha256: its hash, where `initial` is given.
        cut: modules [0, cut) of the Sequential stay at the site.
        head_cut: split_u only: modules [head_cut, end) return to the site.
    """

    factory: str
    settings: dict[str, Any] = msgspec.field(default_factory=dict)
    initial: str | None = None
    initial_sha256: str | None = None
    cut: Positive = 1
    head_cut: Positive | None = None


class RoundSection(_Section, frozen=True, kw_only=True):
    """[round]: how models of the sites become one; for the systems that exchange weights.

    Attributes:
        rounds: how often the server combines what the sites report.
        local_epochs: passes over its training data that a site makes for a report.
        local_batches: training batches for a report, in place of `local_epochs`.
        close: when the server combines: "all" sites that take part have reported; "quorum": `reports` of
            them have, late ones count in the next round; "buffered": `reports` updates have come, and a
            site goes on at once (FedBuff).
        reports: for "quorum" and "buffered".
        deadline_hours: with "quorum", how long a round that has its quorum waits for the others.
        combine: "mean" weighted by training samples, "trimmed_mean" or "median" per coordinate.
        trim: share that "trimmed_mean" leaves out at each end.
        statistics: running statistics of BatchNorm are "pooled" over sites, or stay "local".
        freeze: modules that keep their weights, by dotted name; they are not sent.
        decay: of the learning rate over the run, "none" or "cosine" to zero.
    """

    rounds: Positive = 10
    local_epochs: Positive = 1
    local_batches: Positive | None = None
    close: Literal["all", "quorum", "buffered"] = "all"
    reports: Positive | None = None
    deadline_hours: Annotated[float, Meta(ge=0)] = 0.0
    combine: Literal["mean", "trimmed_mean", "median"] = "mean"
    trim: Annotated[float, Meta(ge=0.0, lt=0.5)] = 0.2
    statistics: Literal["pooled", "local"] = "pooled"
    freeze: list[str] = msgspec.field(default_factory=list)
    decay: Literal["none", "cosine"] = "none"


class TaskSection(_Section, frozen=True, kw_only=True):
    """[task]: what is predicted. `classes` is used by multiclass alone.

    The model ends in 1 output for binary (a logit) and regression, in `classes` logits for multiclass,
    and in one logit per pixel, (1, height, width), for segmentation.
    """

    kind: Literal["binary", "multiclass", "regression", "segmentation"]
    classes: Annotated[int, Meta(ge=2)] = 2

    @property
    def outputs(self) -> int:
        """Width of the model's last layer."""
        return self.classes if self.kind == "multiclass" else 1


class OptimizerSection(_Section, frozen=True, kw_only=True):
    """[optimizer]: the same for every part of the model; each part keeps its own state."""

    name: Literal["sgd", "adam", "adamw"] = "adam"
    lr: Annotated[float, Meta(gt=0)] = 1e-3
    weight_decay: Annotated[float, Meta(ge=0)] = 0.0
    momentum: Share = 0.0


class PrivacySection(_Section, frozen=True, kw_only=True):
    """[privacy]: differential privacy of what each site sends, for the systems that exchange weights.

    A site computes its own noise from these and its number of records, and adds it before anything leaves.

    Attributes:
        epsilon: of one record over the whole run, at each site.
        delta: likewise; below 1 / records.
        clip: L2 norm to which each record's gradient is clipped.
        secure: draw the noise from a cryptographic stream.
    """

    epsilon: Annotated[float, Meta(gt=0)]
    delta: Annotated[float, Meta(gt=0, lt=1)]
    clip: Annotated[float, Meta(gt=0)]
    secure: bool = False


class WireSection(_Section, frozen=True, kw_only=True):
    """[wire]: how tensors travel, and how large things may grow.

    Attributes:
        smashed: codec of activations.
        gradient: codec of gradients.
        zstd: compress bodies (slow links and big backlogs; costs about 400 MB/s per core).
        message_bytes: largest message; RabbitMQ 4 refuses more than 16 MiB unless configured.
        queue_bytes: what a site's up queue may hold before the site waits.
    """

    smashed: Codec = "fp16"
    gradient: Codec = "fp16"
    zstd: bool = False
    message_bytes: Positive = 16 * 2**20
    queue_bytes: Positive = 4 * 2**30


class DataSection(_Section, frozen=True, kw_only=True):
    """[data]: what all sites agree on about their data.

    Attributes:
        features: table columns in order, the same at every site; images and arrays ignore it.
        scaling: "site" fits mean and spread on each site's training patients, "run" uses `mean` and
            `spread`, "none" leaves values as they are.
        mean, spread: one figure per feature, for scaling = "run".
        image_size: side in pixels to which images are resized.
        frames: a sample is a sequence of so many images, evenly spaced over a volume, a DICOM series or a
            sequence of images. None: a sample is one image.
        window: DICOM and volumes: intensities from centre - width / 2 to centre + width / 2 become 0 to 1, the
            name of a usual CT window or [centre, width]. None: the DICOM file's own window, else percentiles.
        classes: labels as the files write them, in the order of the model's outputs. Binary: [negative, positive].
            Segmentation has none.
        target_mean, target_spread: regression only: targets are trained on as (target - mean) / spread and
            reported in their own unit.
        validation, test: share of each site's patients held out for early stopping and for the report.
        augment: applied to training images, in this order.
    """

    features: list[str] = msgspec.field(default_factory=list)
    scaling: Literal["site", "run", "none"] = "site"
    mean: list[float] = msgspec.field(default_factory=list)
    spread: list[float] = msgspec.field(default_factory=list)
    image_size: Positive | None = None
    frames: Positive | None = None
    window: Literal["lung", "mediastinum", "abdomen", "liver", "bone", "brain"] | tuple[float, float] | None = None
    classes: list[str] = msgspec.field(default_factory=list)
    target_mean: float = 0.0
    target_spread: Annotated[float, Meta(gt=0)] = 1.0
    validation: Share = 0.15
    test: Share = 0.2
    augment: list[Literal["flip", "shift", "rotate", "zoom", "contrast"]] = msgspec.field(default_factory=list)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample: (features,) of a table, (1, size, size) of a grey image, (frames, size, size)."""
        if self.image_size is not None:
            return (self.frames or 1, self.image_size, self.image_size)
        return (len(self.features),)


class RunConfig(_Section, frozen=True, kw_only=True):
    """run.toml, the same at every participant."""

    run: RunSection
    model: ModelSection
    task: TaskSection
    optimizer: OptimizerSection = msgspec.field(default_factory=OptimizerSection)
    round: RoundSection = msgspec.field(default_factory=RoundSection)
    privacy: PrivacySection | None = None
    wire: WireSection = msgspec.field(default_factory=WireSection)
    data: DataSection = msgspec.field(default_factory=DataSection)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of what the model says about one sample."""
        if self.task.kind == "segmentation":
            return (1, *self.data.input_shape[1:])
        return (self.task.outputs,)

    def canonical(self) -> str:
        """The whole configuration as one line of JSON with sorted keys, defaults included."""
        return msgspec.json.encode(self, order="sorted").decode()

    @property
    def contract(self) -> str:
        """sha256 of `canonical`: participants whose contracts differ do not work together."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()


class SourceSection(_Section, frozen=True, kw_only=True):
    """[data] of site.toml: where this site's data is, and how to read it.

    Attributes:
        source: "table" (CSV, Parquet), "images" (a folder), "arrays" (.npz), "volumes" (a folder of NIfTI
            files), "dicom" (a folder).
        path: file or folder; `$NAME` is read from the environment; relative to the site.toml.
        label: table or index column, or array name, with the label.
        patient: column or array that says which patient a row belongs to; rows of a patient are
            never divided. None: every row is a patient.
        index: a CSV in the folder of images, volumes or DICOM files, with a `file` column. None: labels
            are folder names.
        images: arrays only: name of the array with the images.
        masks: segmentation: folder of the masks, relative to that of the volumes, or name of the array.
        foreground: segmentation: values of a mask that count as foreground; none: all above 0.
        axis: volumes only: slices lie across it: 0 sagittal, 1 coronal, 2 axial.
        where: rows to keep, by exact value of a column ({"column": ["value", ...]}).
        missing: values that mean "not measured", besides empty; by column, or "*" for all.
        share: [first, last) part of the patients, in [0, 1], for sites cut out of one file.
    """

    source: Literal["table", "images", "arrays", "volumes", "dicom"]
    path: str
    label: str = "label"
    patient: str | None = None
    index: str | None = None
    images: str = "images"
    masks: str | None = None
    foreground: list[int] = msgspec.field(default_factory=list)
    axis: Literal[0, 1, 2] = 2
    where: dict[str, list[str]] = msgspec.field(default_factory=dict)
    missing: dict[str, list[str]] = msgspec.field(default_factory=dict)
    share: tuple[float, float] = (0.0, 1.0)


class WorkerSection(_Section, frozen=True, kw_only=True):
    """What every worker needs. Paths are relative to the file they stand in.

    Attributes:
        run: path of the run.toml.
        broker: "amqps://user@host:5671/vhost", "amqp://..." on this machine, or "embedded:folder".
        store: "rediss://user@host:6379/0", "redis://..." on this machine, or "sqlite:file".
        ca: certificate of the authority that broker and store are verified by; None for the system's.
        certificate, key: this worker's own, for broker and store.
        password: a file with the password for broker and store.
        state: folder for checkpoints; belongs to this worker alone.
        metrics: "host:port" where Prometheus may ask how the worker is; None to open no port.
        shift: hours of work, e.g. "22:00-06:00 Europe/Berlin"; None for always.
        threads: torch threads.
        device: "cpu", "cuda" or "cuda:N".
    """

    run: str = "run.toml"
    broker: str
    store: str
    ca: str | None = None
    certificate: str | None = None
    key: str | None = None
    password: str | None = None
    state: str = "state"
    metrics: Annotated[str, Meta(pattern=r":\d+$")] | None = None
    shift: str | None = None
    threads: Positive = 1
    device: str = "cpu"

    def credentials(self, base: Path) -> Credentials:
        """Its files of certificates and password; relative ones belong to the folder `base`."""

        def path(name: str | None) -> Path | None:
            return None if name is None else base / name

        return Credentials(path(self.ca), path(self.certificate), path(self.key), path(self.password))


class SiteSection(WorkerSection, frozen=True, kw_only=True):
    """[site]: a hospital's worker.

    Attributes:
        name: the site's name in run.sites.
        policy: path of the hospital's policy.toml.
        ledger: path of the file that counts the privacy spent by all runs on this site's data.
    """

    name: Name
    policy: str = "policy.toml"
    ledger: str = "ledger.db"


class ServerSection(WorkerSection, frozen=True, kw_only=True):
    """[server]: the holder of the remaining layers.

    Attributes:
        report: folder for the report and the metrics.

    Encrypted queries are evaluated in `threads` processes, with a torch thread each.
    """

    report: str = "report"


class SiteConfig(_Section, frozen=True, kw_only=True):
    """site.toml."""

    site: SiteSection
    data: SourceSection


class ServerConfig(_Section, frozen=True, kw_only=True):
    """server.toml."""

    server: ServerSection


class PolicyConfig(_Section, frozen=True, kw_only=True):
    """policy.toml: what may leave this hospital. No run can weaken it.

    Attributes:
        labels: labels of training and held-out patients may be sent with their activations.
        stored_activations: the server may keep activations and train on them again.
        bottom_weights: weights of the site's layers may be sent for averaging.
        model_weights: what training here changes in the whole model may be sent.
        tape: the server may keep every message that it receives.
        queries: sequences may be sent encrypted, to be judged; only this site can decrypt them.
        min_batch: smallest number of samples a message may hold.
        max_epsilon: most that all runs together may spend on a record; a run without [privacy] is then refused.
            None: no limit.
    """

    labels: bool = False
    stored_activations: bool = False
    bottom_weights: bool = False
    model_weights: bool = False
    tape: bool = False
    queries: bool = False
    min_batch: Positive = 1
    max_epsilon: Annotated[float, Meta(gt=0)] | None = None
