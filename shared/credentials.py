"""How a worker proves who it is to broker and store, and which lines are private enough.

Every line to another machine is TLS 1.2 or newer with the other side's certificate verified; a
plain one leads to this machine alone.
"""

import ipaddress
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nightsplit.shared.errors import ConfigError

TLS_SCHEMES = ("amqps", "rediss")


@dataclass(frozen=True)
class Credentials:
    """What `nightsplit keys` hands to a worker, as files.

    Attributes:
        ca: certificate of the authority that signed the other side's; None for the system's authorities.
        certificate, key: this worker's own.
        password: holds the password for broker and store, which then need not stand in an address.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    password: Path | None = None

    def tls(self) -> ssl.SSLContext:
        """For a client: TLS 1.2 or newer, the other side verified; ConfigError 113 where a file is missing or wrong."""
        try:
            context = ssl.create_default_context(cafile=self.ca)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, self.key)
        except (OSError, ssl.SSLError) as error:
            named = ", ".join(str(path) for path in (self.ca, self.certificate, self.key) if path is not None)
            what = f"{named}: {error.strerror or error}."
            raise ConfigError(113, what, "let ca, certificate and key name the files handed to you.") from None
        return context

    def secret(self) -> str | None:
        """The password, without the end of its line, or None; ConfigError 113 where its file cannot be read."""
        if self.password is None:
            return None
        try:
            return self.password.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            what = error.strerror if isinstance(error, OSError) else "not a text"
            raise ConfigError(113, f"{self.password}: {what}.", "let password name the file handed to you.") from None


NOBODY = Credentials()
"""No files at all: what there is stands in the address."""


def expect_private(address: str) -> None:
    """Refuse a plain line to another machine.

    Args:
        address: URL of broker or store; may name several hosts, divided by commas.

    Raises:
        ConfigError: 111, for anything but TLS or this machine's own address.
    """
    scheme = scheme_of(address)
    if scheme in TLS_SCHEMES:
        return
    for host, _ in places_of(address):
        if not is_loopback(host):
            what = f"{scheme}://{host} is not on this machine, and the connection would be readable."
            raise ConfigError(111, what, "use amqps:// and rediss:// with certificates; nightsplit keys makes them.")


# By hand: Python's urlsplit takes several hosts only as long as none is an IPv6 address.


def scheme_of(address: str) -> str:
    """What stands before "://"."""
    return address.partition("://")[0].lower()


def places_of(address: str) -> Iterator[tuple[str, int | None]]:
    """Host and port, where it is named, of each in "scheme://user:password@host:port,host:port/path"."""
    for place in address.partition("://")[2].partition("/")[0].rpartition("@")[2].split(","):
        host, _, port = place[1:].partition("]") if place.startswith("[") else place.partition(":")
        port = port.removeprefix(":")
        yield host, int(port) if port.isdecimal() else None


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own, without asking the network."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
