"""Endpoint of a worker's metrics for Prometheus: HTTP on this machine, HTTPS beyond it."""

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
from typing_extensions import override

from nightsplit.shared.address import is_loopback
from nightsplit.shared.credentials import Credentials
from nightsplit.shared.errors import ConfigError


@contextmanager
def serve_metrics(metrics: Collector, address: str, credentials: Credentials) -> Iterator[None]:
    """Serve metrics to Prometheus while the body runs.

    Args:
        metrics: collector of the metrics; this process's memory and processor time are added.
        address: "host:port". Beyond this machine it is HTTPS, for clients with a certificate of the same
            authority.

    Raises:
        ConfigError: 111 an address beyond this machine without certificates, 112 the address cannot be
            used, 113 a certificate cannot be used.
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
        sentence = f"{address}: {getattr(error, 'strerror', None) or error}."
        raise ConfigError(112, sentence, "set metrics to an address of this machine and an unused port.") from None
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
        sentence = f"the metrics at {address} would be readable for the whole network."
        remedy = "name ca, certificate and key in the same file, or set metrics to 127.0.0.1:9400."
        raise ConfigError(111, sentence, remedy)
    credentials.tls()  # raises 113 if a file is wrong
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=ca)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(certificate, key)
    return context


class _Request(WSGIRequestHandler):
    timeout = 10.0  # seconds of silence of a client, also during its handshake

    @override
    def log_message(self, format: str, *args: Any) -> None:
        pass  # scrapes are not logged


class _Server(ThreadingMixIn, WSGIServer):
    """HTTP server with a thread per scrape, so that a hanging one delays neither the next nor the worker's end."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, host: str, port: int, tls: ssl.SSLContext | None) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Request)
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    @override
    def handle_error(self, request: object, client_address: object) -> None:
        pass  # the client knows that it was refused or hung up, and stderr is the worker's
