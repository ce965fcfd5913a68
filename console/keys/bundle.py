"""The folder of keys: made once by `init`, then sites come and go."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import msgspec

from nightsplit.console.keys.accounts import ADMIN, VHOST, Centre
from nightsplit.console.keys.admin import Live, administrator
from nightsplit.console.keys.ca import Authority, new_password
from nightsplit.console.keys.templates import POLICY_TOML, SERVER_TOML, SITE_README, SITE_TOML
from nightsplit.shared.config.load import load
from nightsplit.shared.errors import ConfigError
from nightsplit.shared.storage.files import make_private_folder, write_atomic
from nightsplit.shared.wire.message import SERVER

BROKER_PORT, MANAGEMENT_PORT, STORE_PORT = 5671, 15671, 6379
RESERVED = {SERVER, ADMIN, "default"}


class Addresses(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where broker and store are, as "host:port": what their certificate says, and what sites connect to.

    Attributes:
        broker: of RabbitMQ; of a cluster all nodes, "host:port,host:port".
        management: of its management, used here alone.
        store: of Redis.
    """

    broker: str
    management: str
    store: str

    @property
    def hosts(self) -> set[str]:
        """Every name that the certificate has to hold."""
        places = ",".join(msgspec.structs.astuple(self)).split(",")
        return {place.rpartition(":")[0] for place in places} | {"localhost", "127.0.0.1"}


@dataclass(frozen=True)
class Keys:
    """A folder of keys."""

    folder: Path

    def init(self, addresses: Addresses) -> bool:
        """Make authority, service and server; False, and nothing is changed, when they are there."""
        if self._addresses_file.exists():
            return False
        centre = self._centre
        centre.folder.mkdir(parents=True, exist_ok=True)
        authority = Authority(self.folder / "authority")
        write_atomic(centre.folder / "ca.pem", authority.pem)
        certificate, key = centre.folder / "service.pem", centre.folder / "service.key"
        authority.issue("nightsplit service", certificate, key, addresses.hosts)
        places = msgspec.structs.astuple(addresses)
        centre.configure(*(int(place.rpartition(":")[2]) for place in places))
        admin = new_password()
        write_atomic(centre.folder / "admin_password", admin.encode())
        centre.admit_admin(admin)
        centre.admit_server(self._hand_over(SERVER, centre.folder / SERVER, authority))
        write_atomic(centre.folder / SERVER / "server.toml", self._filled(SERVER_TOML, SERVER, addresses))
        # Last, since it says that all else is there.
        lines = [f'{name} = "{place}"\n' for name, place in msgspec.structs.asdict(addresses).items()]
        write_atomic(self._addresses_file, "".join(lines).encode())
        return True

    def new_site(self, name: str) -> Path | None:
        """Make the folder to hand to a hospital; None, and nothing is changed, when the site is there.

        Raises:
            ConfigError: 103 no name for a site, 113 there are no keys here.
        """
        addresses, centre = self._made(), self._centre
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,62}", name) or name in RESERVED:
            remedy = f"use small letters, digits, - and _, and none of {', '.join(sorted(RESERVED))}."
            raise ConfigError(103, f"{name!r} is no name for a site.", remedy)
        if centre.knows(name):
            return None
        site = self.folder / "sites" / name
        password = self._hand_over(name, site, Authority(self.folder / "authority"))
        for file, text in (("site.toml", SITE_TOML), ("policy.toml", POLICY_TOML), ("README.md", SITE_README)):
            write_atomic(site / file, self._filled(text, name, addresses))
        centre.admit_site(name, password)
        return site

    def revoke(self, name: str) -> None:
        """Take a site's rights away, and its folder if it is still here.

        Raises:
            ConfigError: 113 there are no keys here, or no such site.
        """
        self._made()
        centre = self._centre
        if name in RESERVED or not any(user["name"] == name for user in centre.definitions["users"]):
            raise ConfigError(113, f"{self.folder} knows no site {name}.", "look into centre/definitions.json.")
        centre.revoke(name)
        shutil.rmtree(self.folder / "sites" / name, ignore_errors=True)

    def live(self) -> Live:
        """Broker and store where they run."""
        addresses, centre = self._made(), self._centre
        return Live(centre, administrator(centre.folder), addresses.management, addresses.store)

    @property
    def _centre(self) -> Centre:
        return Centre(self.folder / "centre")

    @property
    def _addresses_file(self) -> Path:
        return self.folder / "centre" / "addresses.toml"

    def _made(self) -> Addresses:
        if not self._addresses_file.exists():
            raise ConfigError(113, f"{self.folder} holds no keys.", "make them with: nightsplit keys init.")
        return load(self._addresses_file, Addresses)

    @staticmethod
    def _hand_over(name: str, folder: Path, authority: Authority) -> str:
        """What every worker gets; returns its password."""
        make_private_folder(folder)
        write_atomic(folder / "ca.pem", authority.pem)
        authority.issue(name, folder / "certificate.pem", folder / "key.pem")
        password = new_password()
        write_atomic(folder / "password", f"{password}\n".encode())
        return password

    @staticmethod
    def _filled(text: str, name: str, addresses: Addresses) -> bytes:
        return text.format(name=name, broker=addresses.broker, store=addresses.store, vhost=VHOST).encode()


def with_port(address: str, port: int) -> str:
    """ "host:port", with `port` where `address` names none; so for each of several, divided by commas."""
    places = address.split(",")
    return ",".join(place if re.search(r":\d+$", place) else f"{place}:{port}" for place in places)
