"""A worker's file and what it refers to, whichever side it is of."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec import Struct

from nightsplit.broker.connect import open_broker
from nightsplit.broker.topology import SiteQueues, query_queues, site_queues
from nightsplit.server_worker.config import ServerConfig, ServerSection
from nightsplit.shared.config.load import load
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.credentials import Credentials
from nightsplit.shared.errors import ConfigError
from nightsplit.shared.protocols.load import load_run
from nightsplit.shared.run_store.base import RunStore
from nightsplit.shared.run_store.connect import open_store
from nightsplit.shared.transport import Broker
from nightsplit.site_worker.config import SiteConfig, SiteSection, SourceSection


class _Tables(Struct):
    """What tells a server.toml from a site.toml."""

    server: Any = None
    site: Any = None


@dataclass(frozen=True)
class WorkerFile:
    """A site.toml or server.toml, with the run.toml that it names.

    Attributes:
        path: the file.
        worker: its [site] or [server].
        source: its [data]; None for a server.
        run: the run.
    """

    path: Path
    worker: SiteSection | ServerSection
    source: SourceSection | None
    run: RunConfig

    @property
    def base(self) -> Path:
        """The folder from which relative paths start."""
        return self.path.parent

    @property
    def run_folder(self) -> Path:
        """The folder of run.toml."""
        return (self.base / self.worker.run).parent

    @property
    def state(self) -> Path:
        """The worker's own folder."""
        return self.base / self.worker.state

    @property
    def credentials(self) -> Credentials:
        """What it shows to broker and store."""
        return self.worker.credentials(self.base)

    @property
    def sites(self) -> list[str]:
        """The sites whose queues and states this worker may see: a site's own, or all of the run."""
        return [self.worker.name] if isinstance(self.worker, SiteSection) else self.run.run.sites

    @property
    def others(self) -> list[str]:
        """Sites that are none of this worker's business; a server has to do with all."""
        return [site for site in self.run.run.sites if site not in self.sites]

    def broker(self) -> Broker:
        """The broker that it names."""
        return open_broker(self.worker.broker, self.base, self.run.wire.message_bytes, self.credentials)

    def store(self) -> RunStore:
        """The run store that it names."""
        return open_store(self.worker.store, self.run.run.id, self.base, self.credentials)

    def queues(self) -> dict[str, SiteQueues]:
        """The queues of `sites`."""
        return {site: site_queues(self.run.run.id, site, self.run.wire.queue_bytes) for site in self.sites}

    def query_queues(self) -> dict[str, SiteQueues]:
        """The queues of `sites` for queries to the finished run's model."""
        return {site: query_queues(self.run.run.id, site, self.run.wire.queue_bytes) for site in self.sites}


def read_worker_file(path: Path, overrides: Sequence[str] = ()) -> WorkerFile:
    """Read a worker's file and its run.toml.

    Raises:
        ConfigError: 101-103, see `nightsplit.shared.protocols.load.load_run`.
    """
    tables = load(path, _Tables)
    if tables.server is None and tables.site is None:
        raise ConfigError(103, f"{path}: has neither [server] nor [site].", "name a server.toml or a site.toml.")
    if tables.server is not None:
        server = load(path, ServerConfig).server
        return WorkerFile(path, server, None, load_run(path.parent / server.run, overrides))
    site = load(path, SiteConfig)
    return WorkerFile(path, site.site, site.data, load_run(path.parent / site.site.run, overrides))
