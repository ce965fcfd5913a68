"""The folder of keys: made once, then sites are added and revoked."""

import re
import shutil
import tomllib
from pathlib import Path

import msgspec

from nightsplit.console.keys.accounts import ADMIN, VHOST, Centre
from nightsplit.console.keys.admin import Services, administrator
from nightsplit.console.keys.ca import Authority, new_password
from nightsplit.console.keys.request import Request, make_request, read_request
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
        self._identities_file = folder / "centre" / "identities.toml"

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
        own = make_request(centre.folder / SERVER, SERVER)
        centre.admit(SERVER, self._make_credentials(read_request(own), authority))
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
        addresses, own = self._load_addresses(), self._centre.folder / SERVER
        if SERVER not in self._read_identities():  # of a version without identities
            identity = read_request(make_request(own, SERVER)).identity
            self._write_identities({SERVER: identity, **self._read_identities()})
        return self._centre.configure(*addresses.ports)

    def new_site(self, request: Request) -> Path | None:
        """Make the folder for a hospital; return None and change nothing if the site exists.

        Raises:
            ConfigError: 103 the name is reserved, 113 the folder has no keys, or the site has another identity.
        """
        addresses, centre, name = self._load_addresses(), self._centre, request.name
        if name in RESERVED:
            remedy = f"use a name other than {', '.join(sorted(RESERVED))}."
            raise ConfigError(103, f"{name!r} is not a valid name of a site.", remedy)
        if centre.admits(name) and name in self._read_identities():
            self._expect_same_identity(request)
            return None
        password = self._make_credentials(request, Authority(self.folder / "authority"))
        site = self.site_folder(name)
        for file, text in (("site.toml", SITE_TOML), ("policy.toml", POLICY_TOML), ("README.md", SITE_README)):
            write_atomic(site / file, self._fill(text, name, addresses))
        centre.admit(name, password)
        return site

    def renew(self, request: Request) -> Path:
        """Sign a new certificate for a hospital that is admitted; return its file.

        Raises:
            ConfigError: 113 the folder has no keys or no such site, or the site has another identity.
        """
        self._load_addresses()
        if not self._centre.admits(request.name):
            raise ConfigError(113, f"{self.folder} has no site {request.name}.", "admit it: nightsplit keys new-site.")
        self._expect_same_identity(request)
        certificate = self.site_folder(request.name) / "certificate.pem"
        make_private_folder(certificate.parent)
        authority = Authority(self.folder / "authority")
        write_atomic(certificate, authority.sign(request.name, request.public_key))
        return certificate

    def parties(self) -> dict[str, str]:
        """Return the public keys of the server and of all admitted sites by name."""
        self._load_addresses()
        return self._read_identities()

    def site_folder(self, name: str) -> Path:
        """Return the folder that is handed to a hospital."""
        return self.folder / "sites" / name

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
        self._write_identities({site: key for site, key in self._read_identities().items() if site != name})
        shutil.rmtree(self.site_folder(name), ignore_errors=True)

    def services(self) -> Services:
        """Return the running broker and store."""
        addresses, centre = self._load_addresses(), self._centre
        return Services(centre, administrator(centre.folder), addresses.management, addresses.store)

    def _load_addresses(self) -> Addresses:
        if not self._addresses_file.exists():
            raise ConfigError(113, f"{self.folder} has no keys.", "make them with: nightsplit keys init.")
        return load(self._addresses_file, Addresses)

    def _make_credentials(self, request: Request, authority: Authority) -> str:
        """Make a worker's certificate and password, note its identity, and return the password."""
        folder = self._centre.folder / SERVER if request.name == SERVER else self.site_folder(request.name)
        make_private_folder(folder)
        write_atomic(folder / "ca.pem", authority.pem)
        write_atomic(folder / "certificate.pem", authority.sign(request.name, request.public_key))
        password = new_password()
        write_atomic(folder / "password", f"{password}\n".encode())
        self._write_identities({**self._read_identities(), request.name: request.identity})
        return password

    def _expect_same_identity(self, request: Request) -> None:
        if self._read_identities().get(request.name, request.identity) != request.identity:
            sentence = f"{request.name} is admitted with another identity."
            remedy = "ask the hospital; if it has a new identity: nightsplit keys revoke, then new-site, and a new run."
            raise ConfigError(113, sentence, remedy)

    def _read_identities(self) -> dict[str, str]:
        if not self._identities_file.exists():
            return {}
        identities: dict[str, str] = tomllib.loads(self._identities_file.read_text(encoding="utf-8"))
        return identities

    def _write_identities(self, identities: dict[str, str]) -> None:
        lines = [f'{name} = "{key}"\n' for name, key in identities.items()]
        write_atomic(self._identities_file, "".join(lines).encode())

    @staticmethod
    def _fill(text: str, name: str, addresses: Addresses) -> bytes:
        return text.format(name=name, broker=addresses.broker, store=addresses.store, vhost=VHOST).encode()


def with_port(address: str, port: int) -> str:
    """Add `port` to each address of a comma-separated list that has none."""
    places = address.split(",")
    return ",".join(place if re.search(r":\d+$", place) else f"{place}:{port}" for place in places)
