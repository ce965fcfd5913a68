"""Checks of the connections to broker and store: encryption, permissions, message size and clock."""

import socket
import ssl
import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from functools import partial

from cryptography import x509

from nightsplit.broker.rabbitmq.probe import Probe
from nightsplit.broker.rabbitmq.version import read_version
from nightsplit.broker.topology import PREFIX, site_queues
from nightsplit.console.doctor.finding import Finding, size
from nightsplit.console.worker_file import WorkerFile
from nightsplit.server_worker.config import ServerSection
from nightsplit.shared.errors import BrokerError, MissingRightError
from nightsplit.shared.protocols.build import build_model, planned_message_bytes
from nightsplit.shared.run_store.base import RunStore
from nightsplit.shared.run_store.redis import RedisStore
from nightsplit.site_worker.config import SiteSection

TIMEOUT_S = 5.0
EXPIRES_SOON_DAYS = 30
SKEW_S_MAX = 60.0
SUPPORTED = {
    "RabbitMQ": ("3.10", "3.13", "4.0", "4.1", "4.2.7", "4.3.1"),
    "Redis": ("7", "8"),
    "Valkey": ("8", "9"),
}
"""Supported series of each server; a third number is the first version of its series that is."""


def link_checks(file: WorkerFile) -> dict[str, Callable[[WorkerFile], Finding]]:
    """Return the checks of this file's connections; none if broker and store are files."""
    checks: dict[str, Callable[[WorkerFile], Finding]] = {}
    if file.config.broker.startswith("amqp") or file.config.store.startswith("redis"):
        checks["servers"] = check_servers
    if file.config.broker.startswith("amqp"):
        checks |= {"TLS": check_encryption, "rights": check_rights, "passage": check_passage}
    if file.config.store.startswith("redis"):
        checks["clock"] = check_clock
    if _power_cuts(file):
        checks["power cut"] = check_power_cut
    return checks


def check_servers(file: WorkerFile) -> Finding:
    """Report product and version of broker and store."""
    servers = []
    if file.config.broker.startswith("amqp"):
        servers.append(Probe(file.config.broker, file.credentials).server())
    with closing(file.open_store()) as store:
        if isinstance(store, RedisStore):
            servers.append(store.server())
    found = ", ".join(f"{product} {version}" for product, version in servers)
    if all(is_supported(product, version) for product, version in servers):
        return Finding("servers", found)
    supported = "; ".join(f"{product} {', '.join(firsts)}" for product, firsts in SUPPORTED.items())
    return Finding("servers", found, f"change to a version that is tested, or to a later patch of it: {supported}.")


def is_supported(product: str, version: str) -> bool:
    """Return whether this version of a server is one of `SUPPORTED`."""
    numbers = read_version(version)
    for first in map(read_version, SUPPORTED.get(product, ())):
        series = first[:2]
        if numbers[: len(series)] == series and numbers >= first:
            return True
    return False


def check_encryption(file: WorkerFile) -> Finding:
    """Report TLS version and certificate expiry of broker and store."""
    file.credentials.tls()  # raises if a file is wrong
    found, ends = [], []
    for address in file.addresses:
        if not address.is_encrypted:
            found.append(f"{address.scheme} is unencrypted, on this machine only")
        for host, port in address.places if address.is_encrypted else ():
            version, end = _handshake(file, host, port)
            found.append(f"{host}: {version}, certificate until {end:%Y-%m-%d}")
            ends.append(end)
    if file.credentials.certificate is not None:
        own = x509.load_pem_x509_certificate(file.credentials.certificate.read_bytes()).not_valid_after_utc
        found.append(f"own certificate until {own:%Y-%m-%d}")
        ends.append(own)
    soon = any((end - datetime.now(UTC)).days < EXPIRES_SOON_DAYS for end in ends)
    return Finding("TLS", "; ".join(found), "have new keys issued." if soon else None)


def _handshake(file: WorkerFile, host: str, port: int) -> tuple[str, datetime]:
    """Return the TLS version and certificate expiry of a service. BrokerError 201 if the handshake fails."""
    try:
        with (
            socket.create_connection((host, port), timeout=TIMEOUT_S) as plain,
            file.credentials.tls().wrap_socket(plain, server_hostname=host, do_handshake_on_connect=False) as secure,
        ):
            secure.do_handshake()
            end = ssl.cert_time_to_seconds(str((secure.getpeercert() or {})["notAfter"]))
            return str(secure.version()), datetime.fromtimestamp(end, UTC)
    except OSError as error:
        remedy = "check the address, and that ca is the centre's authority."
        raise BrokerError(201, f"{host}:{port}: {error}.", remedy) from None


def check_rights(file: WorkerFile) -> Finding:
    """Try forbidden operations at broker and store. None of them changes anything if it is permitted."""
    attempts = {**_attempts_at_broker(file), **_attempts_at_store(file)}
    permitted = [operation for operation, is_permitted in attempts.items() if is_permitted()]
    if not permitted:
        return Finding("rights", f"tried {len(attempts)} forbidden operations; all were refused")
    found = f"{len(permitted)} of {len(attempts)} forbidden operations are permitted: {', '.join(permitted)}"
    if not any(address.is_encrypted for address in file.addresses):
        return Finding(
            "rights", found, "harmless on one machine; for several machines, create users with nightsplit keys."
        )
    return Finding("rights", found, "give this user the rights that nightsplit keys writes.", failed=True)


def _attempts_at_broker(file: WorkerFile) -> dict[str, Callable[[], bool]]:
    probe = Probe(file.config.broker, file.credentials)
    attempts: dict[str, Callable[[], bool]] = {
        "publish to any queue (default exchange)": partial(probe.may_publish, ""),
        "create a queue": partial(probe.may_create, f"doctor.{PREFIX}"),
    }
    if isinstance(file.config, SiteSection):
        own = site_queues(file.run_config.run.id, file.config.name, file.run_config.wire.queue_bytes)
        attempts["publish as the server"] = partial(probe.may_publish, own.down.exchange)
    for other in file.other_sites:
        queues = site_queues(file.run_config.run.id, other, file.run_config.wire.queue_bytes)
        attempts[f"publish as {other}"] = partial(probe.may_publish, queues.up.exchange)
        attempts[f"read the messages to {other}"] = partial(probe.may_read, queues.down)
    return attempts


def _attempts_at_store(file: WorkerFile) -> dict[str, Callable[[], bool]]:
    if not file.config.store.startswith("redis") or not isinstance(file.config, SiteSection):
        return {}
    return {
        "read the server's pointer": partial(_store_permits, file, lambda store: store.pointer()),
        "read the order journal": partial(_store_permits, file, lambda store: store.journal_entry(1)),
        "read the status of other sites": partial(_store_permits, file, lambda store: store.statuses(file.other_sites)),
    }


def _store_permits(file: WorkerFile, read: Callable[[RunStore], object]) -> bool:
    """Return whether the store lets this user read something."""
    with closing(file.open_store()) as store:
        try:
            read(store)
        except MissingRightError:
            return False
    return True


def check_passage(file: WorkerFile) -> Finding:
    """Send a message of the largest planned size to an exchange; it reaches no queue."""
    largest = planned_message_bytes(file.run_config, build_model(file.run_config, file.run_folder).contract)
    probe = Probe(file.config.broker, file.credentials)
    began = time.monotonic()
    try:
        probe.send(file.queues()[file.sites[0]].up, largest)
    except BrokerError as error:
        if error.number == 205:
            return Finding("passage", "the run is not open yet", "nightsplit open server.toml; then run doctor again.")
        raise
    passes = f"the largest planned message, {size(largest)}, passes (in {time.monotonic() - began:.2f} s)"
    return Finding("passage", passes)


def _power_cuts(file: WorkerFile) -> list[Callable[[WorkerFile], Finding]]:
    """Return the checks of losses at a power cut."""
    checks: list[Callable[[WorkerFile], Finding]] = []
    if file.config.broker.startswith("amqp") and isinstance(file.config, ServerSection):  # a site may not find out
        checks.append(_broker_at_power_cut)
    if file.config.store.startswith("redis"):
        checks.append(_store_at_power_cut)
    return checks


def check_power_cut(file: WorkerFile) -> Finding:
    """Report what broker and store lose when their hosts lose power."""
    findings = [check(file) for check in _power_cuts(file)]
    fixes = " ".join(finding.fix for finding in findings if finding.fix)
    return Finding("power cut", "; ".join(finding.found for finding in findings), fixes or None)


def _broker_at_power_cut(file: WorkerFile) -> Finding:
    if not Probe(file.config.broker, file.credentials).loses_at_power_cut(file.queues()[file.sites[0]].up):
        return Finding("power cut", "RabbitMQ loses nothing that it has confirmed")
    found = "the run's queues are classic, and this version of RabbitMQ confirms before their messages are on disk: if "
    found += "its host loses power, they are lost and the run waits for them; killed processes lose nothing"
    return Finding("power cut", found, "move the run to another virtual host (nightsplit move); later runs are safe.")


def _store_at_power_cut(file: WorkerFile) -> Finding:
    with closing(file.open_store()) as store:
        assert isinstance(store, RedisStore)
        try:
            lost = store.loss_at_power_cut()
        except MissingRightError:
            return Finding("power cut", "this user may not ask for Redis's settings; nightsplit keys writes safe ones")
    if lost is None:
        return Finding("power cut", "Redis loses nothing that it has answered")
    found = f"of pointer and order journal, Redis loses {lost} if its host loses power; killed processes lose nothing"
    return Finding("power cut", found, "set appendonly yes and appendfsync always in redis.conf.")


def check_clock(file: WorkerFile) -> Finding:
    """Compare the clocks of this machine and the store. Only shifts and times in reports depend on them."""
    with closing(file.open_store()) as store:
        skew = time.time() - store.now()
    if abs(skew) < SKEW_S_MAX:
        return Finding("clock", "agrees with the run store's to the minute")
    return Finding("clock", f"{skew:+.0f} s from the run store's", "set it (NTP): shifts begin at the wrong time.")
