"""Updates of a running broker and store: a change of users holds at once, also for open connections."""

import base64
import json
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any

import redis

from nightsplit.console.keys.accounts import ADMIN, Centre
from nightsplit.shared.address import read_address
from nightsplit.shared.credentials import Credentials
from nightsplit.shared.errors import BrokerError
from nightsplit.shared.run_store.redis import redis_client

TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Services:
    """Running broker and store, seen by their administrator.

    Attributes:
        centre: their users.
        credentials: credentials of the administrator.
        management, store: "host:port" of RabbitMQ's management and of Redis.
    """

    centre: Centre
    credentials: Credentials
    management: str
    store: str

    def update_broker(self) -> None:
        """Send users and permissions to RabbitMQ, which closes the connections of a deleted user.

        Raises:
            BrokerError: 211 RabbitMQ cannot be reached, or refuses.
        """
        definitions = self.centre.definitions
        self._request("POST", "/api/definitions", json.dumps(definitions))
        for user in definitions["users"]:
            if not self.centre.admits(user["name"]):
                self._request("DELETE", f"/api/users/{user['name']}")

    def update_store(self) -> None:
        """Make Redis read users.acl again; it closes the connections of deleted users.

        Raises:
            BrokerError: 211 Redis cannot be reached, or refuses.
        """
        try:
            with closing(self.connect_redis()) as client:
                client.execute_command("ACL", "LOAD")
        except redis.RedisError as error:
            raise _not_updated(f"Redis at {self.store}: {error}") from None

    def connect_redis(self) -> Any:
        """Connect to Redis as the administrator."""
        return redis_client(read_address(f"rediss://{ADMIN}@{self.store}/0"), self.credentials)

    def _request(self, method: str, path: str, body: str | None = None) -> None:
        host, port = read_address(f"https://{self.management}").places[0]
        login = base64.b64encode(f"{ADMIN}:{self.credentials.secret()}".encode()).decode()
        headers = {"Authorization": f"Basic {login}", "Content-Type": "application/json"}
        try:
            with closing(HTTPSConnection(host, port, timeout=TIMEOUT_S, context=self.credentials.tls())) as http:
                http.request(method, path, body, headers)
                response = http.getresponse()
                response.read()
        except (OSError, HTTPException) as error:
            raise _not_updated(f"RabbitMQ's management at {self.management}: {error}") from None
        if response.status >= 400:
            raise _not_updated(f"RabbitMQ's management at {self.management}: {response.status} {response.reason}")


def administrator(folder: Path) -> Credentials:
    """Return the administrator's credentials in keys/centre: the service's certificate and a password."""
    return Credentials(folder / "ca.pem", folder / "service.pem", folder / "service.key", folder / "admin_password")


def _not_updated(reason: str) -> BrokerError:
    remedy = "the files are written: start the service, or correct its address, then repeat the command."
    return BrokerError(211, f"{reason}.", remedy)
