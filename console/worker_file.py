"""The file of a worker on either side, and the queues, broker and run store that it names."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from nightsplit.broker.connect import open_broker
from nightsplit.broker.topology import SiteQueues, site_queues
from nightsplit.server_worker.config import ServerConfig, ServerSection
from nightsplit.shared.config.load import load
from nightsplit.shared.errors import ConfigError
from nightsplit.shared.runtime.worker import Participant
from nightsplit.shared.transport import Broker
from nightsplit.shared.wire.message import SERVER
from nightsplit.site_worker.config import SiteConfig, SiteSection, SourceSection


class _Tables(Struct):
    """Tables that distinguish a server.toml from a site.toml."""

    server: Any = None
    site: Any = None


class WorkerFile(Participant):
    """Participant as its site.toml or server.toml describes it.

    Attributes:
        path: the file.
        config: its [site] or [server].
        source: its [data]; None for a server.

    Raises:
        ConfigError: 101-103, see `nightsplit.shared.protocols.load.load_run`.
    """

    config: SiteSection | ServerSection
    source: SourceSection | None = None

    def __init__(self, path: Path, overrides: Sequence[str] = ()) -> None:
        self.path = path
        tables = load(path, _Tables)
        if tables.server is not None:
            self.config, name = load(path, ServerConfig).server, SERVER
        elif tables.site is not None:
            site = load(path, SiteConfig)
            self.config, self.source, name = site.site, site.data, site.site.name
        else:
            raise ConfigError(103, f"{path}: has neither [server] nor [site].", "name a server.toml or a site.toml.")
        super().__init__(path.parent, name, self.config, overrides)

    @property
    def sites(self) -> list[str]:
        """Sites with queues and status that this worker may read: itself, or all of the run for the server."""
        return [self.config.name] if isinstance(self.config, SiteSection) else self.run_config.run.sites

    @property
    def other_sites(self) -> list[str]:
        """Sites of the run with queues and status that this worker may not read."""
        return [site for site in self.run_config.run.sites if site not in self.sites]

    def open_broker(self) -> Broker:
        """Open the broker that the file names."""
        return open_broker(self.config.broker, self.base, self.run_config.wire.message_bytes, self.credentials)

    def queues(self, queues_of: Callable[[str, str, int], SiteQueues] = site_queues) -> dict[str, SiteQueues]:
        """Return the queues of each of `sites`: those of training, or with `query_queues` those of queries."""
        run, wire = self.run_config.run, self.run_config.wire
        return {site: queues_of(run.id, site, wire.queue_bytes) for site in self.sites}
