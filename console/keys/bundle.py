"""The folder of keys: made once, then sites are added and revoked."""

import re
import shutil
from pathlib import Path

import msgspec

from nightsplit.console.keys.accounts import ADMIN, VHOST, Centre
from nightsplit.console.keys.admin import Services, administrator
from nightsplit.console.keys.ca import Authority, new_password
from nightsplit.console.keys.templates import POLICY_TOML, SERVER_TOML, SITE_README, SITE_TOML
from nightsplit.shared.address import DEFAULT_PORTS, Address, read_address
from nightsplit.shared.config.load import load
from nightsplit.shared.errors import ConfigError
from nightsplit.shared.storage.files import make_private_folder, write_atomic
from nightsplit.shared.wire.message import SERVER

BROKER_PORT, MANAGEMENT_PORT, STORE_PORT = (DEFAULT_PORTS[scheme] for scheme in ("amqps", "https", "rediss"))
RESERVED = {SERVER, ADMIN, "default"}


class Addresses(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Addresses of broker and store, "host:port": those in their certificate, and those that sites connect to.

    Attributes:
        broker: address of RabbitMQ; for a cluster those of all nodes, "host:port,host:port".
        management: address of its management, used only by nightsplit keys.
        store: address of Redis.
    """

    broker: str
    management: str
    store: str

    @property
    def hosts(self) -> set[str]:
        """Names for the certificate of the services."""
        return {host for service in self._services for host, _ in service.places} | {"localhost", "127.0.0.1"}

    @property
    def ports(self) -> tuple[int, int, int]:
        """Ports of broker, management and store."""
        broker, management, store = (service.places[-1].port for service in self._services)
        return broker, management, store

    @property
    def _services(self) -> list[Address]:
        """Addresses of the services; ConfigError 107 if one cannot be used."""
        texts = (f"amqps://{self.broker}", f"https://{self.management}", f"rediss://{self.store}")
        return [read_address(text) for text in texts]


class Keys:
    """Folder of keys."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._centre = Centre(folder / "centre")
        self._addresses_file = folder / "centre" / "addresses.toml"

    def init(self, addresses: Addresses) -> bool:
        """Make the keys of authority, services and server; return False and change nothing if they exist.

        Raises:
            ConfigError: 107 an address cannot be used.
        """
        if self._addresses_file.exists():
            return False
        hosts, ports = addresses.hosts, addresses.ports  # before any file is written
        centre = self._centre
        centre.folder.mkdir(parents=True, exist_ok=True)
        authority = Authority(self.folder / "authority")
        write_atomic(centre.folder / "ca.pem", authority.pem)
        certificate, key = centre.folder / "service.pem", centre.folder / "service.key"
        authority.issue("nightsplit service", certificate, key, hosts)
        centre.configure(*ports)
        admin = new_password()
        write_atomic(centre.folder / "admin_password", admin.encode())
        centre.admit(ADMIN, admin)
        centre.admit(SERVER, self._make_credentials(SERVER, centre.folder / SERVER, authority))
        write_atomic(centre.folder / SERVER / "server.toml", self._fill(SERVER_TOML, SERVER, addresses))
        # Last, since it marks the folder as complete.
        lines = [f'{name} = "{place}"\n' for name, place in msgspec.structs.asdict(addresses).items()]
        write_atomic(self._addresses_file, "".join(lines).encode())
        return True

    def update(self) -> list[str]:
        """Bring the centre's files up to date with this version; return the names of those that changed.

        Raises:
            ConfigError: 113 the folder has no keys.
        """
        return self._centre.configure(*self._load_addresses().ports)

    def new_site(self, name: str) -> Path | None:
        """Make the folder for a hospital; return None and change nothing if the site exists.

        Raises:
            ConfigError: 103 the name is not valid, 113 the folder has no keys.
        """
        addresses, centre = self._load_addresses(), self._centre
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,62}", name) or name in RESERVED:
            remedy = f"use small letters, digits, - and _, and none of {', '.join(sorted(RESERVED))}."
            raise ConfigError(103, f"{name!r} is not a valid name of a site.", remedy)
        if centre.admits(name):
            return None
        site = self.folder / "sites" / name
        password = self._make_credentials(name, site, Authority(self.folder / "authority"))
        for file, text in (("site.toml", SITE_TOML), ("policy.toml", POLICY_TOML), ("README.md", SITE_README)):
            write_atomic(site / file, self._fill(text, name, addresses))
        centre.admit(name, password)
        return site

    def revoke(self, name: str) -> None:
        """Disable a site's account, and delete its folder if it is still there.

        Raises:
            ConfigError: 113 the folder has no keys, or no such site.
        """
        self._load_addresses()
        centre = self._centre
        if name in RESERVED or not any(user["name"] == name for user in centre.definitions["users"]):
            raise ConfigError(113, f"{self.folder} has no site {name}.", "look into centre/definitions.json.")
        centre.revoke(name)
        shutil.rmtree(self.folder / "sites" / name, ignore_errors=True)

    def services(self) -> Services:
        """Return the running broker and store."""
        addresses, centre = self._load_addresses(), self._centre
        return Services(centre, administrator(centre.folder), addresses.management, addresses.store)

    def _load_addresses(self) -> Addresses:
        if not self._addresses_file.exists():
            raise ConfigError(113, f"{self.folder} has no keys.", "make them with: nightsplit keys init.")
        return load(self._addresses_file, Addresses)

    @staticmethod
    def _make_credentials(name: str, folder: Path, authority: Authority) -> str:
        """Make a worker's certificate, key and password, and return the password."""
        make_private_folder(folder)
        write_atomic(folder / "ca.pem", authority.pem)
        authority.issue(name, folder / "certificate.pem", folder / "key.pem")
        password = new_password()
        write_atomic(folder / "password", f"{password}\n".encode())
        return password

    @staticmethod
    def _fill(text: str, name: str, addresses: Addresses) -> bytes:
        return text.format(name=name, broker=addresses.broker, store=addresses.store, vhost=VHOST).encode()


def with_port(address: str, port: int) -> str:
    """Add `port` to each address of a comma-separated list that has none."""
    places = address.split(",")
    return ",".join(place if re.search(r":\d+$", place) else f"{place}:{port}" for place in places)
