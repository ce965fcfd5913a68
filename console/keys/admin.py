"""Tells a broker and a store that already run who may log in: a change holds at once, also for open connections."""

import base64
import json
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any

import redis

from nightsplit.console.keys.accounts import ADMIN, Centre
from nightsplit.shared.credentials import Credentials
from nightsplit.shared.errors import BrokerError

PATIENCE_S = 10.0


@dataclass(frozen=True, slots=True)
class Live:
    """Broker and store at their addresses, seen as the administrator.

    Attributes:
        centre: what they shall be told.
        credentials: of the administrator.
        management, store: "host:port" of RabbitMQ's management and of Redis.
    """

    centre: Centre
    credentials: Credentials
    management: str
    store: str

    def tell_broker(self) -> None:
        """Users and rights. RabbitMQ itself ends the connections of a user that it has to forget.

        Raises:
            BrokerError: 211 it cannot be told.
        """
        told = self.centre.definitions
        self.ask("POST", "/api/definitions", told)
        for user in told["users"]:
            if not self.centre.knows(user["name"]):
                self.ask("DELETE", f"/api/users/{user['name']}")

    def tell_store(self) -> None:
        """Read users.acl again; Redis itself ends the connections of users that are gone.

        Raises:
            BrokerError: 211 it cannot be told.
        """
        try:
            with closing(self.redis()) as client:
                client.execute_command("ACL", "LOAD")
        except redis.RedisError as error:
            raise _untold(f"Redis at {self.store}: {error}") from None

    def redis(self) -> Any:
        """A connection to Redis as the administrator."""
        host, _, port = self.store.rpartition(":")
        return redis.Redis(
            host=host, port=int(port), username=ADMIN, password=self.credentials.secret(), ssl=True,
            ssl_ca_certs=str(self.credentials.ca), ssl_certfile=str(self.credentials.certificate),
            ssl_keyfile=str(self.credentials.key), socket_timeout=PATIENCE_S, socket_connect_timeout=PATIENCE_S,
        )  # fmt: skip

    def ask(self, method: str, path: str, content: object = None) -> Any:
        """What RabbitMQ's management answers, read as JSON; None where it answers nothing.

        Raises:
            BrokerError: 211 it cannot be reached, or refuses.
        """
        host, _, port = self.management.rpartition(":")
        login = base64.b64encode(f"{ADMIN}:{self.credentials.secret()}".encode()).decode()
        headers = {"Authorization": f"Basic {login}", "Content-Type": "application/json"}
        body = None if content is None else json.dumps(content)
        try:
            with closing(HTTPSConnection(host, int(port), timeout=PATIENCE_S, context=self.credentials.tls())) as line:
                line.request(method, path, body, headers)
                answer = line.getresponse()
                text = answer.read()
        except (OSError, HTTPException) as error:
            raise _untold(f"RabbitMQ's management at {self.management}: {error}") from None
        if answer.status >= 400:
            raise _untold(f"RabbitMQ's management at {self.management}: {answer.status} {answer.reason}")
        return json.loads(text) if text else None


def administrator(folder: Path) -> Credentials:
    """Of keys/centre: the service's own certificate, and the administrator's password."""
    return Credentials(folder / "ca.pem", folder / "service.pem", folder / "service.key", folder / "admin_password")


def _untold(what: str) -> BrokerError:
    remedy = "the files are written: start the service, or correct its address, and give the command again."
    return BrokerError(211, f"{what}.", remedy)
