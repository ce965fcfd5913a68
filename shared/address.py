"""Addresses of RabbitMQ and Redis, parsed here alone.

    amqps://user:password@host:port,host:port/virtual host        rediss://user:password@host:port/database

Libraries get the parts of an address, never its text, so that none can find another host or weaker encryption in it.
Characters in which parsers differ (`#`, `?`, `\\`, a second `@`, spaces) are refused, and so is every option; in a
user, a password or a virtual host they are written as %XX. An unencrypted address of another machine is refused,
too: every `Address` is one that may be connected to.
"""

import ipaddress
import re
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import unquote

from typing_extensions import override

from nightsplit.shared.errors import ConfigError

DEFAULT_PORTS = {"amqp": 5672, "amqps": 5671, "https": 15671, "redis": 6379, "rediss": 6379}
"""Ports of the known schemes; https is that of RabbitMQ's management."""

_TLS_SCHEMES = ("amqps", "https", "rediss")
_EXAMPLES = {"amqp": "amqps://user:password@host:5671/vhost", "redis": "rediss://user:password@host:6379/0"}
_TEXT = r"(?:[A-Za-z0-9._~!$&'()*+=-]|%[0-9A-Fa-f]{2})"
_ADDRESS = re.compile(
    rf"(?P<scheme>[a-z]+)://"
    rf"(?:(?P<user>{_TEXT}*)(?::(?P<password>{_TEXT}*))?@)?"
    rf"(?P<places>[^/@]+)"
    rf"(?:/(?P<path>{_TEXT}*))?"
)
_PLACE = re.compile(r"(?:(?P<name>[A-Za-z0-9_][A-Za-z0-9._-]*)|\[(?P<ipv6>[0-9A-Fa-f:.]+)\])(?::(?P<port>[0-9]{1,5}))?")


class Place(NamedTuple):
    """Name or IP address of a host, and a port."""

    host: str
    port: int


@dataclass(frozen=True)
class Address:
    """Address of a service, without %XX. Its text is the part that may be shown: scheme, hosts and ports.

    Attributes:
        scheme: a key of `DEFAULT_PORTS`.
        user, password: None where the address has none.
        places: nodes of a cluster, or one.
        path: virtual host of RabbitMQ, or number of a database of Redis; may be empty.
    """

    scheme: str
    user: str | None
    password: str | None = field(repr=False)
    places: tuple[Place, ...]
    path: str

    @property
    def is_encrypted(self) -> bool:
        """True if connections use TLS."""
        return self.scheme in _TLS_SCHEMES

    @override
    def __str__(self) -> str:
        hosts = (f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.places)
        return f"{self.scheme}://{','.join(hosts)}"


def read_address(text: str) -> Address:
    """Parse an address of RabbitMQ or Redis.

    Raises:
        ConfigError: 107 it is not one, or parsers could read it differently; 111 connections to it would be
            unencrypted, and the host is another machine.
    """
    found = _ADDRESS.fullmatch(text)
    scheme = found["scheme"] if found is not None else text.partition(":")[0]
    if found is None or scheme not in DEFAULT_PORTS:
        raise _unusable(scheme)
    try:
        user, password, path = (part and _decode(part) for part in found.group("user", "password", "path"))
        places = tuple(_read_place(place, DEFAULT_PORTS[scheme]) for place in found["places"].split(","))
    except ValueError:
        raise _unusable(scheme) from None
    is_redis = scheme.startswith("redis")
    if is_redis and (len(places) > 1 or not re.fullmatch("[0-9]{0,5}", path or "")):
        raise _unusable(scheme)
    address = Address(scheme, user or None, password, places, path or "")
    for host, _ in places:
        if not (address.is_encrypted or is_loopback(host)):
            sentence = f"{scheme}://{host} is not on this machine, and the connection would be readable."
            remedy = "use amqps:// and rediss:// with certificates; nightsplit keys creates them."
            raise ConfigError(111, sentence, remedy)
    return address


def is_loopback(host: str) -> bool:
    """Return whether a name or an address is this machine's own, without a query to the network."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _decode(text: str) -> str:
    """Replace %XX; ValueError if it stands for a control character or is no UTF-8."""
    decoded = unquote(text, errors="strict")
    if not decoded.isprintable():
        raise ValueError
    return decoded


def _read_place(text: str, default_port: int) -> Place:
    """Parse "host", "host:port" or "[IPv6 address]:port"; ValueError if it is none of these."""
    found = _PLACE.fullmatch(text)
    if found is None:
        raise ValueError
    port = default_port if found["port"] is None else int(found["port"])
    if not 1 <= port <= 65535:
        raise ValueError
    host = found["name"] or str(ipaddress.IPv6Address(found["ipv6"]))
    return Place(host.lower(), port)


def _unusable(scheme: str) -> ConfigError:
    """Return the error for an address of a service, which quotes nothing: it may contain a password."""
    example = _EXAMPLES["redis" if scheme.startswith("redis") else "amqp"]
    sentence = f"an address of {scheme}:// has a character, an option or a number that it must not have."
    remedy = f"write {example}, without options, and each sign in a user, a password or a virtual host as %XX."
    return ConfigError(107, sentence, remedy)
