"""What doctor finds about the lines to broker and store: encryption, rights, and what passes through."""

import socket
import ssl
import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from functools import partial

from cryptography import x509

from nightsplit.broker.rabbitmq.probe import Probe
from nightsplit.broker.topology import PREFIX, site_queues
from nightsplit.console.doctor.finding import Finding, size
from nightsplit.console.keys.bundle import BROKER_PORT, STORE_PORT
from nightsplit.console.worker_file import WorkerFile
from nightsplit.shared.credentials import TLS_SCHEMES, places_of, scheme_of
from nightsplit.shared.errors import BrokerError
from nightsplit.shared.protocols.build import build_model, planned_message_bytes
from nightsplit.shared.run_store.base import RunStore
from nightsplit.site_worker.config import SiteSection

PATIENCE_S = 5.0
EXPIRES_SOON_DAYS = 30
DEFAULT_PORTS = {"amqps": BROKER_PORT, "rediss": STORE_PORT}
SKEW_S = 60.0


def checks_of_lines(file: WorkerFile) -> dict[str, Callable[[WorkerFile], Finding]]:
    """What there is to check of this file's lines; nothing where broker and store are files."""
    checks: dict[str, Callable[[WorkerFile], Finding]] = {}
    if file.config.broker.startswith("amqp"):
        checks |= {"TLS": check_encryption, "rights": check_rights, "passage": check_passage}
    if file.config.store.startswith("redis"):
        checks["clock"] = check_clock
    return checks


def check_encryption(file: WorkerFile) -> Finding:
    """TLS to broker and store: its version, and until when certificates are good."""
    file.credentials.tls()  # says what is wrong with a file
    found, ends = [], []
    for address in (file.config.broker, file.config.store):
        scheme = scheme_of(address)
        if scheme in ("amqp", "redis"):
            found.append(f"{scheme} is plain, to this machine alone")
        for host, port in places_of(address) if scheme in TLS_SCHEMES else ():
            version, end = _greeted(file, host, port or DEFAULT_PORTS[scheme])
            found.append(f"{host}: {version}, certificate until {end:%Y-%m-%d}")
            ends.append(end)
    if file.credentials.certificate is not None:
        own = x509.load_pem_x509_certificate(file.credentials.certificate.read_bytes()).not_valid_after_utc
        found.append(f"own certificate until {own:%Y-%m-%d}")
        ends.append(own)
    soon = any((end - datetime.now(UTC)).days < EXPIRES_SOON_DAYS for end in ends)
    return Finding("TLS", "; ".join(found), "have new keys made." if soon else None)


def _greeted(file: WorkerFile, host: str, port: int) -> tuple[str, datetime]:
    """TLS version of a service, and the last day of its certificate. BrokerError 201 when it does not answer so."""
    try:
        with (
            socket.create_connection((host, port), timeout=PATIENCE_S) as line,
            file.credentials.tls().wrap_socket(line, server_hostname=host, do_handshake_on_connect=False) as secure,
        ):
            secure.do_handshake()
            end = ssl.cert_time_to_seconds(str((secure.getpeercert() or {})["notAfter"]))
            return str(secure.version()), datetime.fromtimestamp(end, UTC)
    except OSError as error:
        remedy = "check the address, and that ca is the centre's authority."
        raise BrokerError(201, f"{host}:{port}: {error}.", remedy) from None


def check_rights(file: WorkerFile) -> Finding:
    """Tries what has to be refused, at broker and store. Nothing that is let through changes anything."""
    attempts = {**_at_broker(file), **_at_store(file)}
    open_doors = [what for what, permitted in attempts.items() if permitted()]
    if not open_doors:
        return Finding("rights", f"tried {len(attempts)} forbidden things; all were refused")
    found = f"{len(open_doors)} of {len(attempts)} forbidden things are possible: {', '.join(open_doors)}"
    if all(scheme_of(address) not in TLS_SCHEMES for address in (file.config.broker, file.config.store)):
        return Finding("rights", found, "fine on one machine; for several, make users with nightsplit keys.")
    return Finding("rights", found, "give this user the rights that nightsplit keys writes.", failed=True)


def _at_broker(file: WorkerFile) -> dict[str, Callable[[], bool]]:
    probe = Probe(file.config.broker, file.credentials)
    attempts: dict[str, Callable[[], bool]] = {
        "publish to any queue (default exchange)": partial(probe.may_publish, ""),
        "create a queue": partial(probe.may_create, f"doctor.{PREFIX}"),
    }
    for other in file.other_sites:
        queues = site_queues(file.run_config.run.id, other, file.run_config.wire.queue_bytes)
        attempts[f"publish as {other}"] = partial(probe.may_publish, queues.up.exchange)
        attempts[f"read what is sent to {other}"] = partial(probe.may_read, queues.down)
    return attempts


def _at_store(file: WorkerFile) -> dict[str, Callable[[], bool]]:
    if not file.config.store.startswith("redis") or not isinstance(file.config, SiteSection):
        return {}
    return {
        "read the server's pointer": partial(_answers, file, lambda store: store.pointer()),
        "read the order journal": partial(_answers, file, lambda store: store.journalled(1)),
        "read how other sites are": partial(_answers, file, lambda store: store.statuses(file.other_sites)),
    }


def _answers(file: WorkerFile, question: Callable[[RunStore], object]) -> bool:
    """Whether the store answers this user."""
    with closing(file.open_store()) as store:
        try:
            question(store)
        except BrokerError as error:
            if "permission" in error.sentence:
                return False
            raise
    return True


def check_passage(file: WorkerFile) -> Finding:
    """Sends as many bytes as the largest planned message has, as far as an exchange; they reach no queue."""
    largest = planned_message_bytes(file.run_config, build_model(file.run_config, file.run_folder).contract)
    probe = Probe(file.config.broker, file.credentials)
    began = time.monotonic()
    try:
        probe.send(file.queues()[file.sites[0]].up, largest)
    except BrokerError as error:
        if error.number == 205:
            return Finding("passage", "the run is not open yet", "nightsplit open server.toml; then ask again.")
        raise
    passes = f"the largest planned message, {size(largest)}, passes (in {time.monotonic() - began:.2f} s)"
    harmless = "consumer_timeout does no harm: what waits longer for its turn (RabbitMQ: 30 min unless changed)"
    return Finding("passage", f"{passes}. {harmless} is delivered again")


def check_clock(file: WorkerFile) -> Finding:
    """This machine's clock against the store's. Nothing but shifts and times in reports depends on it."""
    with closing(file.open_store()) as store:
        skew = time.time() - store.now()
    if abs(skew) < SKEW_S:
        return Finding("clock", "agrees with the run store's to the minute")
    return Finding("clock", f"is {skew:+.0f} s from the run store's", "set it (NTP): shifts begin at wrong hours.")
