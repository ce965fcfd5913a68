"""Content of run.toml as frozen objects. All participants of a run hold the same file, and compare its `digest`."""

import hashlib
import math
import re
from datetime import date, datetime, time
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from nightsplit.shared.config.optimizer import OptimizerSection
from nightsplit.shared.config.section import KeyConflictError, Name, Natural, Positive, PublicKeyText, Section, Share
from nightsplit.shared.wire.codecs import FloatCodec
from nightsplit.shared.wire.message import ENVELOPE_BYTES, SERVER

OWN_NETWORKS = "nightsplit.models"
"""Module of the networks of nightsplit, and the only one of its modules that a run may name."""

_YOUNGER = {
    "run": ("learning", "passes"),
    "optimizer": ("betas", "warmup", "schedule", "clip_norm", "bottom", "top", "head"),
}
"""Keys that are part of the digest only where they are not the defaults: runs from before them keep their digests."""

_FACTORY = re.compile(r"([A-Za-z0-9_-]+\.py|[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):[A-Za-z]\w*", re.ASCII)
_WEIGHTS_FILE = re.compile(r"\w[\w.-]*\.safetensors", re.ASCII)


class RunSection(Section, frozen=True, kw_only=True):
    """[run]: participants, protocol and order of training.

    Attributes:
        id: name of the run; part of every queue name.
        protocol: one of `nightsplit.shared.protocols.spec.PROTOCOLS`.
        sites: names of the participating sites.
        seed: seed of every random choice in the run.
        learning: "steps", a gradient step for each answer; "targets" (split_labels, split_u), fits to displacements of
            activations, a block of `window` batches at a time, for sites and servers that are never online together.
        passes: of a fit over its block, with "targets".
        order: "strict", a fixed function of site and seq, or "fair", weighted round robin over arrived messages.
        window: smashed batches a site may have unanswered; 1 is synchronous training. With "targets": most batches of a
            block; two blocks may be unanswered.
        epochs: passes over each site's training data (split_frozen: over the stored activations).
        batch_size: fewest samples of a smashed batch; a remainder is spread over batches. In rounds: samples per step.
        evaluate_every: epochs between evaluations on held-out patients.
        patience: evaluations without improvement before the run stops early; 0 never stops early.
        bottoms: "independent", or "averaged" over sites every `average_every` training batches, with "targets" at the
            end of every block.
        export_top: whether to send the server's part of the best model to the sites at the end.
        quorum: number of sites that must stay; the run excludes others that fall silent. None: all must stay.
        absence_hours: longest silence of a site that the run waits for, before it is excluded.
        tape: whether the server keeps every message that it receives, for `nightsplit replay`.
    """

    id: Name
    protocol: str
    sites: Annotated[list[Name], Meta(min_length=1)]
    seed: Natural = 0
    learning: Literal["steps", "targets"] = "steps"
    passes: Positive = 4
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
    def may_exclude(self) -> bool:
        """True if the run may exclude a site."""
        return self.quorum is not None and self.quorum < len(self.sites)

    def __post_init__(self) -> None:
        if len(set(self.sites)) != len(self.sites):
            raise KeyConflictError("sites", "a name occurs twice", "give every site a different name.")
        if SERVER in self.sites:
            raise KeyConflictError("sites", f"{SERVER!r} is the server's own name", "rename the site.")
        if self.quorum is not None and self.quorum > len(self.sites):
            raise KeyConflictError("quorum", "a quorum above the number of sites", f"set at most {len(self.sites)}.")
        if self.learning == "steps" and self.bottoms == "averaged" and self.average_every < self.window:
            sentence = f"below the window of {self.window}, averagings would overlap and correct weights twice"
            raise KeyConflictError("average_every", sentence, "set it to the window or more.")


class ModelSection(Section, frozen=True, kw_only=True):
    """[model]: factory and cut of the model.

    Attributes:
        factory: function, called with `settings`, that returns `nn.Sequential` or `ModelParts`: of nightsplit
            ("nightsplit.models:mlp"), of a file beside run.toml ("model.py:make"), or of an installed package
            ("package.module:function").
        settings: keyword arguments of the factory.
        code_sha256: hash of the file that `factory` names; required with one.
        initial: file beside run.toml with the published model's initial weights; None for fresh ones.
        initial_sha256: its hash; required with `initial`.
        cut: modules [0, cut) of the Sequential stay at the site.
        head_cut: split_u only: modules [head_cut, end) return to the site.
    """

    factory: str
    settings: dict[str, Any] = msgspec.field(default_factory=dict)
    code_sha256: Annotated[str, Meta(pattern=r"^[0-9a-fA-F]{64}\Z")] | None = None
    initial: str | None = None
    initial_sha256: str | None = None
    cut: Positive = 1
    head_cut: Positive | None = None

    @property
    def code_file(self) -> str | None:
        """Name of the file that `factory` names; None if it names a module."""
        place = self.factory.partition(":")[0]
        return place if place.endswith(".py") else None

    @property
    def package(self) -> str | None:
        """Module of an installed package that `factory` names; None for a file and for nightsplit's own networks."""
        place = self.factory.partition(":")[0]
        return None if place == OWN_NETWORKS or self.code_file else place

    def __post_init__(self) -> None:
        if not _FACTORY.fullmatch(self.factory):
            sentence = f"{self.factory!r} names no function of a package or of a file beside run.toml"
            raise KeyConflictError("factory", sentence, f'write for example "{OWN_NETWORKS}:mlp" or "model.py:make".')
        if self.package and self.package.partition(".")[0] == "nightsplit":
            sentence = f"{self.factory!r} is not a network of nightsplit"
            raise KeyConflictError("factory", sentence, f"its networks are in {OWN_NETWORKS}.")
        if (self.code_file is None) is not (self.code_sha256 is None):
            sentence = "a file in factory, and nothing else there, needs its hash"
            raise KeyConflictError("code_sha256", sentence, "give what sha256sum prints, or remove the key.")
        if self.initial is not None and not _WEIGHTS_FILE.fullmatch(self.initial):
            sentence = f"{self.initial!r} is not the name of a .safetensors file beside run.toml"
            raise KeyConflictError("initial", sentence, "put the file beside run.toml, and give its name alone.")
        if (self.initial is None) is not (self.initial_sha256 is None):
            raise KeyConflictError("initial_sha256", "a published model needs its hash", "give both keys, or neither.")


class RoundSection(Section, frozen=True, kw_only=True):
    """[round]: aggregation of the sites' models, for protocols that exchange weights.

    Attributes:
        rounds: number of aggregations at the server.
        local_epochs: passes over a site's training data per report.
        local_batches: training batches per report, in place of `local_epochs`.
        close: condition of an aggregation: "all" participating sites have reported; "quorum": `reports` of
            them have, late ones count in the next round; "buffered": `reports` updates have arrived, and a
            site continues at once (FedBuff).
        reports: for "quorum" and "buffered".
        deadline_hours: with "quorum", hours that a round with its quorum waits for the others.
        combine: "geometric_median" (of two sites: the mean) or "mean", both weighted by training samples;
            "trimmed_mean" or "median" per coordinate.
        trim: share that "trimmed_mean" drops at each end.
        statistics: running statistics of BatchNorm are "pooled" over sites, or stay "local".
        freeze: dotted names of modules that keep their weights; they are not sent.
        decay: schedule of the learning rate over the run, "none" or "cosine" to zero.
    """

    rounds: Positive = 10
    local_epochs: Positive = 1
    local_batches: Positive | None = None
    close: Literal["all", "quorum", "buffered"] = "all"
    reports: Positive | None = None
    deadline_hours: Annotated[float, Meta(ge=0)] = 0.0
    combine: Literal["geometric_median", "mean", "trimmed_mean", "median"] = "geometric_median"
    trim: Annotated[float, Meta(ge=0.0, lt=0.5)] = 0.2
    statistics: Literal["pooled", "local"] = "pooled"
    freeze: list[str] = msgspec.field(default_factory=list)
    decay: Literal["none", "cosine"] = "none"

    def __post_init__(self) -> None:
        if (self.close == "all") is not (self.reports is None):
            sentence = f'close = "{self.close}" {"has no" if self.reports else "needs"} reports'
            raise KeyConflictError("reports", sentence, 'give reports for "quorum" and "buffered" alone.')


class TaskSection(Section, frozen=True, kw_only=True):
    """[task]: prediction target. `classes` is used by multiclass alone.

    The model ends in 1 output for binary (a logit) and regression, in `classes` logits for multiclass,
    and in one logit per pixel, (1, height, width), for segmentation.
    """

    kind: Literal["binary", "multiclass", "regression", "segmentation"]
    classes: Annotated[int, Meta(ge=2)] = 2

    @property
    def outputs(self) -> int:
        """Width of the model's last layer."""
        return self.classes if self.kind == "multiclass" else 1


class PrivacySection(Section, frozen=True, kw_only=True):
    """[privacy]: differential privacy of each site's messages, for protocols that exchange weights.

    A site computes its own noise from these and its number of records, and adds it before it sends anything.

    Attributes:
        epsilon: privacy loss of one record over the whole run, at each site.
        delta: failure probability, likewise; at most 1 / records of any site.
        clip: L2 norm to which each record's gradient is clipped.
        secure: whether to draw the noise from a cryptographic stream.
    """

    epsilon: Annotated[float, Meta(gt=0)]
    delta: Annotated[float, Meta(gt=0, lt=1)]
    clip: Annotated[float, Meta(gt=0)]
    secure: bool = False


class WireSection(Section, frozen=True, kw_only=True):
    """[wire]: encoding of tensors, and limits of messages and queues.

    Attributes:
        smashed: codec of activations.
        gradient: codec of gradients.
        zstd: whether to compress tensors (for slow connections and big backlogs; about 400 MB/s per core).
        message_bytes: largest message; RabbitMQ 4 refuses more than 16 MiB unless configured.
        queue_bytes: capacity of a site's up queue; the site waits while it is full.
    """

    smashed: FloatCodec = "fp16"
    gradient: FloatCodec = "fp16"
    zstd: bool = False
    message_bytes: Positive = 16 * 2**20
    queue_bytes: Positive = 4 * 2**30


class DataSection(Section, frozen=True, kw_only=True):
    """[data]: format and preparation of the data, the same at all sites.

    Attributes:
        features: table columns in order; images and arrays ignore it.
        scaling: "site" fits mean and spread on each site's training patients, "run" uses `mean` and
            `spread`, "none" leaves values as they are.
        mean, spread: one figure per feature, for scaling = "run".
        image_size: side in pixels to which images are resized.
        frames: images per sample, evenly spaced over a volume, a DICOM series or a sequence of images.
            None: a sample is one image.
        window: DICOM and volumes: intensities from centre - width / 2 to centre + width / 2 become 0 to 1, the
            name of a usual CT window or [centre, width]. None: the DICOM file's own window, else percentiles.
        classes: labels as written in the files, in the order of the model's outputs. Binary: [negative, positive].
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

    def __post_init__(self) -> None:
        if self.validation + self.test >= 0.9:
            raise KeyConflictError("test", "validation and test leave too little for training", "lower one of them.")
        inputs = len(self.features) or self.frames or 1  # of a table, of a sequence, or the one channel of an image
        if self.scaling == "run" and not inputs == len(self.mean) == len(self.spread):
            sentence = 'scaling = "run" needs one mean and one spread per feature'
            raise KeyConflictError("mean", sentence, 'give both lists, or use scaling = "site".')
        if self.features and self.frames is not None:
            raise KeyConflictError("frames", "a table has no frames", "remove it, or set image_size, not features.")
        if isinstance(self.window, tuple) and self.window[1] <= 0:
            raise KeyConflictError("window", f"a width of {self.window[1]}", "give [centre, width], the width above 0.")


class RunConfig(Section, frozen=True, kw_only=True):
    """Content of run.toml, the same at every participant.

    Attributes:
        parties: public keys of the server and of all sites, "ed25519:..."; `nightsplit keys parties` prints them. None:
            messages are neither signed nor sealed, which is possible on a single machine only.
    """

    run: RunSection
    model: ModelSection
    task: TaskSection
    optimizer: OptimizerSection = msgspec.field(default_factory=OptimizerSection)
    round: RoundSection = msgspec.field(default_factory=RoundSection)
    privacy: PrivacySection | None = None
    wire: WireSection = msgspec.field(default_factory=WireSection)
    data: DataSection = msgspec.field(default_factory=DataSection)
    parties: dict[str, PublicKeyText] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.parties and set(self.parties) != {SERVER, *self.run.sites}:
            sentence = (
                f"keys of {', '.join(sorted(self.parties))}, but the run has {SERVER}, {', '.join(self.run.sites)}"
            )
            raise KeyConflictError("parties", sentence, "give one key for the server and one for each site.")
        if bool(self.data.features) == (self.data.image_size is not None):
            sentence = "a run has either features or image_size"
            raise KeyConflictError("data.features", sentence, "name a table's columns, or the images' side.")
        self._check_canonical()

    def _check_canonical(self) -> None:
        """Refuse values that JSON does not keep: runs that differ in them would have the same digest."""
        tables = msgspec.to_builtins(self, builtin_types=(date, datetime, time))
        for table, keys in tables.items():
            for key, value in (keys or {}).items():
                if not _has_place_in_json(value):
                    sentence = "a number that is not finite, or a date, has no place in a run"
                    raise KeyConflictError(f"{table}.{key}", sentence, "write a finite number, or the date as a text.")

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the model's output for one sample."""
        if self.task.kind == "segmentation":
            return (1, *self.data.input_shape[1:])
        return (self.task.outputs,)

    @property
    def content_bytes(self) -> int:
        """Size of the largest message inside its envelope; without keys there is none."""
        return self.wire.message_bytes - (ENVELOPE_BYTES if self.parties else 0)

    def canonical(self) -> str:
        """Return the whole configuration as one line of JSON with sorted keys, defaults included but for `_YOUNGER`."""
        tables = msgspec.to_builtins(self)
        for table, keys in _YOUNGER.items():
            defaults = {field.name: field.default for field in msgspec.structs.fields(getattr(self, table))}
            for key in keys:
                if getattr(getattr(self, table), key) == defaults[key]:
                    del tables[table][key]
        return msgspec.json.encode(tables, order="sorted").decode()

    @property
    def digest(self) -> str:
        """SHA-256 of `canonical`; participants with different digests do not work together."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()


def _has_place_in_json(value: object) -> bool:
    """Return whether JSON keeps a value of TOML: it writes null for infinite numbers, and a text for a date."""
    if isinstance(value, dict):
        return all(map(_has_place_in_json, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_has_place_in_json, value))
    return math.isfinite(value) if isinstance(value, float) else not isinstance(value, date | time)
