"""Configuration of broker and store: their users with their permissions, and TLS.

RabbitMQ reads `definitions.json` and `rabbitmq.conf`, Redis `users.acl` and `redis.conf`. Both
accept only TLS with a client certificate of our authority, and then check the password.
"""

import base64
import hashlib
import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nightsplit.broker.topology import NO_RIGHTS, POLICIES, PREFIX, SERVER_RIGHTS, Rights, site_rights
from nightsplit.shared.run_store.redis import SERVER_RULES, site_rules
from nightsplit.shared.storage.files import write_atomic
from nightsplit.shared.wire.message import SERVER

ADMIN = "admin"
VHOST = PREFIX

RABBITMQ = """\
# Written by nightsplit keys; paths are those of the machine or container where RabbitMQ runs. nightsplit keys init may
# write it again: keep settings of your own in another file, which RABBITMQ_CONFIG_FILES names.
listeners.tcp = none
listeners.ssl.1 = {broker_port}
ssl_options.cacertfile = {folder}/ca.pem
ssl_options.certfile = {folder}/service.pem
ssl_options.keyfile = {folder}/service.key
ssl_options.verify = verify_peer
ssl_options.fail_if_no_peer_cert = true
ssl_options.versions.1 = tlsv1.3
ssl_options.versions.2 = tlsv1.2
# Because definitions are loaded, there is no guest user.
load_definitions = {folder}/definitions.json
# Larger than wire.message_bytes of any run (default 16 MiB).
max_message_size = 134217728
# RabbitMQ takes back what is not acknowledged in time; from 4.3 on only in quorum queues. Workers acknowledge within
# two checkpoints, about a minute, unless a disk or a connection is very slow.
consumer_timeout = 7200000
vm_memory_high_watermark.relative = 0.6
disk_free_limit.absolute = 2GB
management.ssl.port = {management_port}
management.ssl.cacertfile = {folder}/ca.pem
management.ssl.certfile = {folder}/service.pem
management.ssl.keyfile = {folder}/service.key
management.ssl.versions.1 = tlsv1.3
management.ssl.versions.2 = tlsv1.2
management.ssl.verify = verify_peer
management.ssl.fail_if_no_peer_cert = true
prometheus.ssl.port = 15691
prometheus.ssl.cacertfile = {folder}/ca.pem
prometheus.ssl.certfile = {folder}/service.pem
prometheus.ssl.keyfile = {folder}/service.key
prometheus.ssl.versions.1 = tlsv1.3
prometheus.ssl.versions.2 = tlsv1.2
prometheus.ssl.verify = verify_peer
prometheus.ssl.fail_if_no_peer_cert = true
# From 3.11 on there is a second listener, without TLS; 3.10 does not know the setting that closes it.
prometheus.tcp.ip = 127.0.0.1
prometheus.tcp.port = 15692
"""

REDIS = """\
# Written by nightsplit keys; paths are those of the machine or container where Redis runs. nightsplit keys init may
# write it again: keep settings of your own in another file, which includes this one.
port 0
tls-port {store_port}
tls-ca-cert-file {folder}/ca.pem
tls-cert-file {folder}/service.pem
tls-key-file {folder}/service.key
tls-auth-clients yes
tls-protocols "TLSv1.2 TLSv1.3"
aclfile {folder}/users.acl
# The pointer to the newest checkpoint and the order journal must survive a power cut.
appendonly yes
appendfsync always
# A run needs some megabytes. No site can fill more than a status of this size for each run that is open.
proto-max-bulk-len 1mb
maxmemory 2gb
maxmemory-policy noeviction
maxmemory-clients 512mb
"""

PLUGINS = "[rabbitmq_management,rabbitmq_prometheus].\n"

_RULES_BEGIN = " resetchannels "
"""Text in users.acl between a user's password and rules."""


class Centre:
    """Files of broker and store in keys/centre: how they listen, and their users."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._definitions = folder / "definitions.json"
        self._acl = folder / "users.acl"

    def configure(self, broker_port: int, management_port: int, store_port: int) -> list[str]:
        """Write the files of both services as this version has them, and keep their users.

        Return the names of the files that changed. What was in them before is kept beside them, in `<name>.old`.
        """
        ports = {"broker_port": broker_port, "management_port": management_port, "store_port": store_port}
        files = {
            "rabbitmq.conf": RABBITMQ.format(folder=self._path_at_service, **ports),
            "redis.conf": REDIS.format(folder=self._path_at_service, **ports),
            "enabled_plugins": PLUGINS,
            self._definitions.name: self._present_definitions(),
            self._acl.name: self._present_acl(),
        }
        changed = [name for name, text in files.items() if _read(self.folder / name) != text]
        for name in changed:
            if before := _read(self.folder / name):
                _write(self.folder / f"{name}.old", before)
            _write(self.folder / name, files[name])
        return changed

    @property
    def _path_at_service(self) -> str:
        """Path of this folder at broker and store, as in the present files: in a container it is another one."""
        written = re.search(r"^load_definitions = (.*)/definitions\.json$", _read(self.folder / "rabbitmq.conf"), re.M)
        return written[1] if written else str(self.folder.absolute())

    def _present_definitions(self) -> str:
        """Return the content of definitions.json with present rights."""
        definitions: dict[str, Any] = {"vhosts": [{"name": VHOST}], "users": [], "permissions": [], "policies": []}
        if self._definitions.exists():
            definitions = self.definitions
        others = [policy for policy in definitions["policies"] if policy["name"] not in POLICIES]
        definitions["policies"] = [
            {"vhost": VHOST, "name": name, "pattern": pattern, "apply-to": "queues", "priority": priority,
             "definition": definition}
            for priority, (name, (pattern, definition)) in enumerate(POLICIES.items())
        ] + others  # fmt: skip
        for permission in definitions["permissions"]:
            if self.admits(permission["user"]):
                permission |= asdict(_permissions_of(permission["user"])[0])
        return json.dumps(definitions, indent=2)

    def _present_acl(self) -> str:
        """Return the content of users.acl with present rules."""
        lines = (_read(self._acl) or "user default off\n").splitlines()
        users = [line.partition(_RULES_BEGIN) for line in lines]
        present = [f"{user}{begin}{_permissions_of(user.split()[1])[1] if begin else ''}" for user, begin, _ in users]
        return "\n".join([*present, ""])

    def admit(self, name: str, password: str) -> None:
        """Add a user: the administrator, the server, or a site with permissions for its own queues and keys."""
        rights, rules = _permissions_of(name)
        salt = os.urandom(4)
        digest = hashlib.sha256(salt + password.encode()).digest()
        self._define(name, base64.b64encode(salt + digest).decode(), rights)
        self._rule(name, f"on #{hashlib.sha256(password.encode()).hexdigest()}{_RULES_BEGIN}{rules}")

    def revoke(self, name: str) -> None:
        """Disable a user. It stays in the definitions, since importing them into RabbitMQ deletes no user."""
        self._define(name, "", NO_RIGHTS)
        self._rule(name, "off")

    def admits(self, name: str) -> bool:
        """Return whether `name` can log in."""
        return any(user["name"] == name and user["password_hash"] for user in self.definitions["users"])

    @property
    def definitions(self) -> dict[str, Any]:
        """Content of definitions.json: users, permissions and policies of RabbitMQ."""
        definitions: dict[str, Any] = json.loads(self._definitions.read_text(encoding="utf-8"))
        return definitions

    def _define(self, name: str, password_hash: str, rights: Rights) -> None:
        definitions, tags = self.definitions, "administrator" if name == ADMIN else ""
        algorithm = "rabbit_password_hashing_sha256"
        user = {"name": name, "password_hash": password_hash, "hashing_algorithm": algorithm, "tags": tags}
        permission = {"user": name, "vhost": VHOST, **asdict(rights)}
        for key, field, entry in (("users", "name", user), ("permissions", "user", permission)):
            definitions[key] = [*(other for other in definitions[key] if other[field] != name), entry]
        _write(self._definitions, json.dumps(definitions, indent=2))

    def _rule(self, name: str, rules: str) -> None:
        lines = self._acl.read_text(encoding="utf-8").splitlines()
        others = [line for line in lines if line.split()[1] != name]
        _write(self._acl, "\n".join([*others, f"user {name} {rules}", ""]))


def _permissions_of(name: str) -> tuple[Rights, str]:
    """Return a user's permissions at RabbitMQ, and its ACL rules at Redis."""
    if name == ADMIN:
        return Rights(".*", ".*", ".*"), "~* &* +@all"
    if name == SERVER:
        return SERVER_RIGHTS, SERVER_RULES
    return site_rights(name), site_rules(name)


def _read(path: Path) -> str:
    """Return the content of a file; empty if it does not exist."""
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _write(path: Path, text: str) -> None:
    """Write a file that RabbitMQ or Redis reads as its own system user; only the folder restricts access."""
    write_atomic(path, text.encode(), mode=0o644)
