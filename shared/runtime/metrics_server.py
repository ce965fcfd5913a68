"""The address where Prometheus reads a worker's metrics: HTTP on this machine, HTTPS beyond it."""

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app
from prometheus_client.registry import Collector

from nightsplit.shared.credentials import Credentials, is_loopback
from nightsplit.shared.errors import ConfigError


@contextmanager
def served(metrics: Collector, address: str, credentials: Credentials) -> Iterator[None]:
    """Answer Prometheus while the block runs.

    Args:
        metrics: what to tell, beside this process's memory and processor time.
        address: "host:port". Beyond this machine it is HTTPS, for clients that show a certificate of
            the same authority.
        credentials: certificates for HTTPS.

    Raises:
        ConfigError: 111 an address beyond this machine without certificates, 112 nobody can listen there,
            113 a certificate cannot be used.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    tls = None if is_loopback(host) else _tls(address, credentials)
    registry = CollectorRegistry()
    registry.register(metrics)
    ProcessCollector(registry=registry)
    try:
        server = _Server(host, int(port), tls)
    except (OSError, OverflowError) as error:
        what = f"{address}: {getattr(error, 'strerror', None) or error}."
        raise ConfigError(112, what, "give metrics an address of this machine and a port of its own.") from None
    server.set_app(make_wsgi_app(registry))
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _tls(address: str, credentials: Credentials) -> ssl.SSLContext:
    ca, certificate, key = credentials.ca, credentials.certificate, credentials.key
    if ca is None or certificate is None or key is None:
        what = f"the metrics at {address} would be readable for the whole network."
        raise ConfigError(111, what, "name ca, certificate and key in the same file, or let metrics be 127.0.0.1:9400.")
    credentials.tls()  # raises 113 for what is wrong with the files
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=ca)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(certificate, key)
    return context


class _Request(WSGIRequestHandler):
    timeout = 10.0  # of a silent client, also in the middle of its handshake

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are no events."""


class _Server(ThreadingMixIn, WSGIServer):
    """A thread for each scrape: one that hangs holds up neither the next nor the worker's end."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, host: str, port: int, tls: ssl.SSLContext | None) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Request)
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    def handle_error(self, request: object, client_address: object) -> None:
        """Whoever was refused or hung up knows it; stderr is the worker's."""
