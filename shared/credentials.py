"""Credentials of a worker at broker and store, and the encryption of its connections.

Every connection to another machine uses TLS 1.2 or newer and verifies the other side's certificate;
an unencrypted one is allowed only to this machine.
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
    """Files of a worker from `nightsplit keys`.

    Attributes:
        ca: certificate of the CA that signed the other side's; None for the system's CAs.
        certificate, key: this worker's own.
        password: file with the password for broker and store, which an address then need not contain.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    password: Path | None = None

    def tls(self) -> ssl.SSLContext:
        """Return a client's context: TLS 1.2 or newer, the server verified; ConfigError 113 if a file is unusable."""
        try:
            context = ssl.create_default_context(cafile=self.ca)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, self.key)
        except (OSError, ssl.SSLError) as error:
            files = ", ".join(str(path) for path in (self.ca, self.certificate, self.key) if path is not None)
            sentence = f"{files}: {error.strerror or error}."
            raise ConfigError(113, sentence, "set ca, certificate and key to the files you were given.") from None
        return context

    def secret(self) -> str | None:
        """Return the password without its newline, or None; ConfigError 113 if its file cannot be read."""
        if self.password is None:
            return None
        try:
            return self.password.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a text"
            raise ConfigError(113, f"{self.password}: {reason}.", "set password to the file you were given.") from None


NO_CREDENTIALS = Credentials()
"""Credentials without files: an address may still contain a password."""


def expect_private(address: str) -> None:
    """Refuse an unencrypted connection to a host of `address` that is not this machine; ConfigError 111."""
    scheme = scheme_of(address)
    if scheme in TLS_SCHEMES:
        return
    for host, _ in hosts_of(address):
        if not is_loopback(host):
            sentence = f"{scheme}://{host} is not on this machine, and the connection would be readable."
            remedy = "use amqps:// and rediss:// with certificates; nightsplit keys creates them."
            raise ConfigError(111, sentence, remedy)


# By hand, since Python's urlsplit fails on several hosts if one is an IPv6 address.


def scheme_of(address: str) -> str:
    """Return the scheme, the part before "://"."""
    return address.partition("://")[0].lower()


def hosts_of(address: str) -> Iterator[tuple[str, int | None]]:
    """Yield each host in "scheme://user:password@host:port,host:port/path", with its port if there is one."""
    authority = address.partition("://")[2].partition("/")[0]
    for part in authority.rpartition("@")[2].split(","):
        is_ipv6 = part.startswith("[")  # "[::1]:5672"
        host, _, port = part[1:].partition("]") if is_ipv6 else part.partition(":")
        port = port.removeprefix(":")
        yield host, int(port) if port.isdecimal() else None


def is_loopback(host: str) -> bool:
    """Return whether a name or an address is this machine's own, without a query to the network."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
