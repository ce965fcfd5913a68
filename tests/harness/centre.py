"""A coordinating centre for tests: RabbitMQ and Redis as `nightsplit keys` configures them, with TLS and users."""

from __future__ import annotations

import socket
import ssl
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from nightsplit.console.keys.admin import administrator
from nightsplit.console.keys.bundle import Addresses, Keys
from nightsplit.console.keys.request import make_request, read_request
from nightsplit.shared.credentials import Credentials
from tests.harness.services import RabbitNode, RedisServer, free_port
from tests.harness.workers import SHARES, Hospital

SITES = tuple(SHARES)


class SecureNode(RabbitNode):
    """RabbitMQ by the configuration that `nightsplit keys init` wrote."""

    def __init__(self, folder: Path, keys: Keys, port: int) -> None:
        super().__init__(folder)
        self.port = port
        self._centre = keys.folder / "centre"
        configured = (self._centre / "rabbitmq.conf").read_text(encoding="utf-8")
        # Several nodes run on a machine that tests; and a test must not depend on an empty disk.
        for port in ("15691", "15692"):
            configured = configured.replace(port, str(free_port()))
        configured = configured.replace("absolute = 2GB", "absolute = 50MB")
        (folder / "rabbitmq.conf").write_text(configured, encoding="utf-8")
        (folder / "enabled_plugins").write_text((self._centre / "enabled_plugins").read_text(encoding="utf-8"))

    def environment(self) -> dict[str, str]:
        settings = super().environment()
        del settings["RABBITMQ_NODE_PORT"]  # it would add a plain listener
        # As docs/how-to/deployment.md says, for which the node's name ends in @localhost, too.
        settings["RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS"] += " -kernel inet_dist_use_interface {127,0,0,1}"
        return settings

    def answers(self) -> bool:
        try:
            with (
                socket.create_connection(("localhost", self.port), timeout=5) as line,
                administrator(self._centre)
                .tls()
                .wrap_socket(line, server_hostname="localhost", do_handshake_on_connect=False) as secure,
            ):
                secure.do_handshake()
                secure.sendall(b"AMQP\x00\x00\x09\x01")
                return secure.recv(1) == b"\x01"
        except (OSError, ssl.SSLError):
            return False


class SecureRedis(RedisServer):
    """Redis by the configuration that `nightsplit keys init` wrote."""

    def __init__(self, folder: Path, keys: Keys, port: int) -> None:
        super().__init__(folder)
        self.port = port
        self._keys = keys

    def command(self) -> list[str]:
        program, *_ = super().command()
        return [program, str(self._keys.folder.absolute() / "centre" / "redis.conf"), "--dir", str(self.folder)]

    def answers(self) -> bool:
        try:
            with closing(self._keys.services().connect_redis()) as client:
                return bool(client.ping())
        except Exception:
            return False


class Centre:
    """Keys, broker and store of one consortium, and how its workers log in."""

    def __init__(self, folder: Path) -> None:
        self.keys = Keys(folder / "keys")
        broker, management, store = (free_port() for _ in range(3))
        self.addresses = Addresses(f"localhost:{broker}", f"localhost:{management}", f"localhost:{store}")
        self.keys.init(self.addresses)
        for site in SITES:
            self.keys.new_site(read_request(make_request(self.keys.site_folder(site), site)))
        # So that one pattern names the folder of every worker.
        (self.keys.folder / "sites" / "server").symlink_to("../centre/server")
        self.node = SecureNode(folder / "rabbitmq", self.keys, broker)
        self.redis = SecureRedis(folder / "redis", self.keys, store)

    def __enter__(self) -> Self:
        self.node.start()
        self.redis.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.redis.kill()
        self.node.kill()

    def another_node(self, folder: Path) -> SecureNode:
        """A second broker with the same users and certificates, on ports of its own."""
        node, conf = SecureNode(folder, self.keys, free_port()), folder / "rabbitmq.conf"
        text = conf.read_text(encoding="utf-8")
        management = self.addresses.management.rpartition(":")[2]
        for taken, free in ((self.node.port, node.port), (management, free_port())):
            assert f" = {taken}\n" in text
            text = text.replace(f" = {taken}\n", f" = {free}\n")
        conf.write_text(text, encoding="utf-8")
        return node

    def credentials(self, worker: str) -> Credentials:
        """Of a worker."""
        place = self.keys.folder / "sites" / worker
        return Credentials(place / "ca.pem", place / "certificate.pem", place / "key.pem", place / "password")

    def hospital(self, folder: Path, **more: Any) -> Hospital:
        """A run whose workers log in here, each as itself."""
        return Hospital(
            folder, broker=self.broker("{worker}"), store=self.store("{worker}"), files=self._files(), **more
        )

    def broker(self, worker: str) -> str:
        """Its address of the broker."""
        return f"amqps://{worker}@{self.addresses.broker}/nightsplit"

    def store(self, worker: str) -> str:
        """Its address of the store."""
        return f"rediss://{worker}@{self.addresses.store}/0"

    def _files(self) -> str:
        """Lines that name a worker's credentials; {worker} is to be filled in."""
        names = {"ca": "ca.pem", "certificate": "certificate.pem", "key": "key.pem", "password": "password"}
        return "".join(f'{key} = "{self.keys.folder}/sites/{{worker}}/{file}"\n' for key, file in names.items())
