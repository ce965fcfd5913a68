"""Approvals of a hospital: the runs, and the code of their models, that its workers may use.

    run.toml, code ──▶ Request ──approve, by a person──▶ approved.toml ──check──▶ worker

A worker checks its run before it imports or builds anything.
"""

import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Self

import msgspec

from nightsplit.shared.config.load import load
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.config.section import Name, Section
from nightsplit.shared.errors import ConfigError, StateError
from nightsplit.shared.models.factory import Code, locate_run_file, read_code
from nightsplit.shared.protocols.load import load_run
from nightsplit.shared.storage.files import write_atomic
from nightsplit.site_worker.config import SiteConfig, SiteSection


class Approval(Section, frozen=True, kw_only=True, omit_defaults=True):
    """Approval of a run at a site.

    Attributes:
        site, run: their names.
        digest: the run's digest.
        code: version of the code, as in `Code`; None for a network of nightsplit.
        person: who approved.
        time: time of the approval.
        settings: the run, as in `RunConfig.canonical`.
        text: text of the code, if it is a file.
    """

    site: Name
    run: Name
    digest: str
    code: str | None = None
    person: str
    time: datetime
    settings: str
    text: str | None = None

    @property
    def sha256(self) -> str:
        """Hash by which the exit log names this approval."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()


class _Approvals(Section, frozen=True):
    """Contents of approved.toml."""

    approval: list[Approval] = msgspec.field(default_factory=list)


class Request:
    """Request of a run for the approval of a site; `path` is its site.toml, and `site` the [site] there.

    Raises:
        ConfigError: 101-103 the file of approvals cannot be read.
    """

    def __init__(self, path: Path, site: SiteSection, run: RunConfig) -> None:
        self._path, self._folder = path, (path.parent / site.run).parent
        self.site, self.run = site.name, run
        self.policy_file = path.parent / site.policy
        self.file = path.parent / site.approvals
        approvals = load(self.file, _Approvals).approval if self.file.exists() else []
        self._earlier = [approval for approval in approvals if approval.site == site.name]

    @classmethod
    def read(cls, path: Path, overrides: Sequence[str] = ()) -> Self:
        """Read the request of a site.toml; ConfigError 101-103."""
        site = load(path, SiteConfig).site
        return cls(path, site, load_run(path.parent / site.run, overrides))

    @cached_property
    def code(self) -> Code:
        """Code of the run's model; ConfigError as `read_code` and, for its initial weights, `locate_run_file`."""
        if self.run.model.initial is not None:
            locate_run_file(self._folder, self.run.model.initial)
        return read_code(self.run.model, self._folder)

    @property
    def last(self) -> Approval | None:
        """The site's last approval, of any run."""
        return self._earlier[-1] if self._earlier else None

    @property
    def approval(self) -> Approval | None:
        """The last approval of this run as it is configured now."""
        return next((known for known in reversed(self._earlier) if known.digest == self.run.digest), None)

    def check(self) -> Approval:
        """Return the approval of the run and its code.

        Raises:
            ConfigError: 118 the run is not approved, 119 its code is not the approved one; others as `read_code`.
        """
        remedy = f"read what it does and who learns what, and decide: nightsplit approve {self._path}."
        approval = self.approval
        if approval is None:
            sentence = f"{self.file} has no approval of run {self.run.run.id} with digest {self.run.digest[:12]}"
            raise ConfigError(118, f"{sentence} for {self.site}.", remedy)
        if approval.code != self.code.version:
            sentence = f"{approval.code} was approved, here is {self.code.version}."
            raise ConfigError(119, sentence, remedy)
        return approval

    def approve(self, person: str) -> Approval:
        """Add an approval to the file.

        Raises:
            ConfigError: as `read_code`.
            StateError: 501 the file cannot be written.
        """
        approval = Approval(
            site=self.site, run=self.run.run.id, digest=self.run.digest, code=self.code.version, person=person,
            time=datetime.now(UTC).replace(microsecond=0), settings=self.run.canonical(), text=self.code.text,
        )  # fmt: skip
        fields = msgspec.to_builtins(approval, builtin_types=[datetime]).items()
        entry = "".join(f"{key} = {_toml(value)}\n" for key, value in fields)
        try:
            before = self.file.read_bytes() if self.file.exists() else b""
            write_atomic(self.file, before + f"[[approval]]\n{entry}\n".encode())
        except OSError as error:
            remedy = "set approvals in site.toml to a file that this user may write."
            raise StateError(501, f"{self.file}: {error.strerror}.", remedy) from None
        self._earlier.append(approval)
        return approval


def approve(path: Path, person: str, overrides: Sequence[str] = ()) -> Approval:
    """Approve the run of a site.toml as it is configured now, unless it is approved; raises as `Request`."""
    request = Request.read(path, overrides)
    known = request.approval
    return known if known is not None and known.code == request.code.version else request.approve(person)


def _toml(value: str | datetime) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # of JSON's strings TOML refuses this alone
