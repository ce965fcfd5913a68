"""Tells a broker and a store that already run who may log in: a change holds at once, also for open connections."""

from __future__ import annotations

import base64
import json
from contextlib import closing
from http.client import HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any

import redis

from nightsplit.console.keys.accounts import ADMIN, Centre
from nightsplit.shared.credentials import Credentials
from nightsplit.shared.errors import BrokerError

PATIENCE_S = 10.0


class Live:
    """Broker and store at their addresses, seen as the administrator.

    Args:
        centre: what they shall be told.
        credentials: of the administrator.
        management, store: "host:port" of RabbitMQ's management and of Redis.
    """

    def __init__(self, centre: Centre, credentials: Credentials, management: str, store: str) -> None:
        self._centre = centre
        self._credentials = credentials
        self._management = management
        self._store = store

    def tell_broker(self) -> None:
        """Users and rights. RabbitMQ itself ends the connections of a user that it has to forget.

        Raises:
            BrokerError: 211 it cannot be told.
        """
        told = self._centre.definitions
        self.ask("POST", "/api/definitions", told)
        for user in told["users"]:
            if not self._centre.knows(user["name"]):
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
            raise _untold(f"Redis at {self._store}: {error}") from None

    def redis(self) -> Any:
        """A connection to Redis as the administrator."""
        host, _, port = self._store.rpartition(":")
        return redis.Redis(
            host=host, port=int(port), username=ADMIN, password=self._credentials.secret(), ssl=True,
            ssl_ca_certs=str(self._credentials.ca), ssl_certfile=str(self._credentials.certificate),
            ssl_keyfile=str(self._credentials.key), socket_timeout=PATIENCE_S, socket_connect_timeout=PATIENCE_S,
        )  # fmt: skip

    def ask(self, method: str, path: str, content: object = None) -> Any:
        """What RabbitMQ's management answers, read as JSON; None where it answers nothing.

        Raises:
            BrokerError: 211 it cannot be reached, or refuses.
        """
        host, _, port = self._management.rpartition(":")
        login = base64.b64encode(f"{ADMIN}:{self._credentials.secret()}".encode()).decode()
        headers = {"Authorization": f"Basic {login}", "Content-Type": "application/json"}
        body = None if content is None else json.dumps(content)
        try:
            line = HTTPSConnection(host, int(port), timeout=PATIENCE_S, context=self._credentials.tls())
            with closing(line):
                line.request(method, path, body, headers)
                answer = line.getresponse()
                text = answer.read()
        except (OSError, HTTPException) as error:
            raise _untold(f"RabbitMQ's management at {self._management}: {error}") from None
        if answer.status >= 400:
            raise _untold(f"RabbitMQ's management at {self._management}: {answer.status} {answer.reason}")
        return json.loads(text) if text else None


def administrator(folder: Path) -> Credentials:
    """Of keys/centre: the service's own certificate, and the administrator's password."""
    return Credentials(folder / "ca.pem", folder / "service.pem", folder / "service.key", folder / "admin_password")


def _untold(what: str) -> BrokerError:
    return BrokerError(
        211, f"{what}.", "the files are written: start the service, or correct its address, and give the command again."
    )
