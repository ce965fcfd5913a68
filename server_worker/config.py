"""server.toml, as a frozen object."""

from nightsplit.shared.config.section import Section
from nightsplit.shared.config.worker import WorkerSection


class ServerSection(WorkerSection, frozen=True, kw_only=True):
    """[server]: the worker with the layers behind the cut.

    Attributes:
        report: folder for the report and the metrics.

    Encrypted queries are evaluated in `threads` processes, with a torch thread each.
    """

    report: str = "report"


class ServerConfig(Section, frozen=True, kw_only=True):
    """server.toml."""

    server: ServerSection
