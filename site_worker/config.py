"""The hospital's files as frozen objects: site.toml and policy.toml."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from nightsplit.shared.config.section import Name, Positive, PublicKeyText, Section
from nightsplit.shared.config.worker import WorkerSection
from nightsplit.shared.wire.schema import Reveals


class SourceSection(Section, frozen=True, kw_only=True):
    """[data] of site.toml: location and format of the site's data.

    Attributes:
        source: "table" (CSV, Parquet), "images" (a folder), "arrays" (.npz), "volumes" (a folder of NIfTI
            files), "dicom" (a folder).
        path: file or folder, relative to site.toml; `$NAME` is an environment variable.
        label: column of the table or index, or name of the array, with the label.
        patient: column or array with the patient of each row; the rows of a patient stay together.
            None: every row is a patient.
        index: CSV in the folder of images, volumes or DICOM files, with a `file` column. None: labels
            are folder names.
        images: arrays only: name of the array with the images.
        masks: segmentation: folder of the masks, relative to that of the volumes, or name of the array.
        foreground: segmentation: values of a mask that count as foreground; empty: all above 0.
        axis: volumes only: axis across which slices are cut: 0 sagittal, 1 coronal, 2 axial.
        where: rows to keep, by exact value of a column ({"column": ["value", ...]}).
        missing: values that mean "not measured", besides an empty cell; by column, or "*" for all.
        share: [first, last) fraction of the patients, in [0, 1], for several sites from one file.
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


class SiteSection(WorkerSection, frozen=True, kw_only=True):
    """[site] of site.toml: settings of the hospital's worker.

    Attributes:
        name: the site's name in run.sites.
        policy: path of the hospital's policy.toml.
        approvals: path of the file to which `nightsplit approve` adds the approved runs.
        ledger: path of the privacy ledger of all runs on this site's data.
    """

    name: Name
    policy: str = "policy.toml"
    approvals: str = "approved.toml"
    ledger: str = "ledger.db"


class SiteConfig(Section, frozen=True, kw_only=True):
    """Contents of site.toml."""

    site: SiteSection
    data: SourceSection


class PolicyConfig(Section, frozen=True, kw_only=True):
    """Contents of policy.toml: limits on the messages of this hospital. No run can weaken them.

    Attributes:
        allowed: kinds of patient information that messages may reveal; "nothing" is always allowed.
        packages: installed packages, or modules of them, of which a run may use the models.
        server_sets_weights: the server's weights may replace those of the site's layers.
        tape: the server may keep every message that it receives.
        min_batch: smallest number of samples in a message that holds single samples.
        max_epsilon: largest epsilon that all runs together may spend on a record; a run without [privacy] is then
            refused. None: no limit.
        distrusted: public keys, as in [parties] of run.toml, with which this hospital takes part in nothing.
    """

    allowed: list[Reveals] = msgspec.field(
        default_factory=lambda: [Reveals.ACTIVATIONS, Reveals.GRADIENTS, Reveals.COUNTS]
    )
    packages: list[str] = msgspec.field(default_factory=list)
    server_sets_weights: bool = False
    tape: bool = False
    min_batch: Positive = 1
    max_epsilon: Annotated[float, Meta(gt=0)] | None = None
    distrusted: list[PublicKeyText] = msgspec.field(default_factory=list)
