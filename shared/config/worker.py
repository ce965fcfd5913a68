"""Section shared by site.toml and server.toml."""

from pathlib import Path
from typing import Annotated

from msgspec import Meta

from nightsplit.shared.config.section import Positive, Section
from nightsplit.shared.credentials import Credentials


class WorkerSection(Section, frozen=True, kw_only=True):
    """Settings of every worker. Paths are relative to the file that contains them.

    Attributes:
        run: path of the run.toml.
        broker: "amqps://user@host:5671/vhost", "amqp://..." on this machine, or "embedded:folder".
        store: "rediss://user@host:6379/0", "redis://..." on this machine, or "sqlite:file".
        ca: CA certificate that verifies broker and store; None for the system's.
        certificate, key: this worker's own, for broker and store.
        password: file with the password for broker and store.
        identity: file with the key that signs this worker's messages, made by `nightsplit keys`.
        state: folder for checkpoints, for this worker alone.
        metrics: "host:port" of the endpoint for Prometheus; None to open no port.
        shift: hours of work, e.g. "22:00-06:00 Europe/Berlin"; None for always.
        threads: number of torch threads.
        device: "cpu", "cuda" or "cuda:N".
    """

    run: str = "run.toml"
    broker: str
    store: str
    ca: str | None = None
    certificate: str | None = None
    key: str | None = None
    password: str | None = None
    identity: str | None = None
    state: str = "state"
    metrics: Annotated[str, Meta(pattern=r":\d+$")] | None = None
    shift: str | None = None
    threads: Positive = 1
    device: str = "cpu"

    def credentials(self, base: Path) -> Credentials:
        """Return the worker's certificate and password files; relative paths are resolved in the folder `base`."""
        names = (self.ca, self.certificate, self.key, self.password)
        return Credentials(*(None if name is None else base / name for name in names))
