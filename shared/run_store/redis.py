"""Run store in Redis, for servers on several hosts. Each change by a server is one script of lua/, so it is atomic.

    nightsplit:{<run>}:status:<worker>            list of one entry: time and record, as JSON
    nightsplit:{<run>}:lease, :pointer, :journal  hashes

A site runs no script, which could stop the store for all. Its only command that writes is LSET, which creates no key:
so it reports to runs that a server has opened (`admit`) and fills the memory with nothing else. redis.conf, as
`nightsplit keys` writes it, limits the size of an entry.

Redis must run with `appendonly yes`. With `appendfsync everysec` a returned change survives the
death of any process, including the Redis server, but not a host that crashes within the second;
`appendfsync always` protects the journal and the pointer against that, too. All times are the
Redis server's own, so clocks of workers may differ.
"""

import json
import ssl
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache, partial
from importlib import resources
from typing import Any, TypeVar

import msgspec
import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry
from typing_extensions import override

from nightsplit.shared.address import Address, read_address
from nightsplit.shared.credentials import NO_CREDENTIALS, Credentials
from nightsplit.shared.errors import BrokerError, MissingRightError
from nightsplit.shared.run_store.base import RunStore, Status, age_seconds
from nightsplit.shared.run_store.status import UNREADABLE, WorkerStatus, read_status, write_status
from nightsplit.shared.storage.checkpoint import Pointer
from nightsplit.shared.wire.message import SERVER

TIMEOUT_SECONDS = 5.0

T = TypeVar("T")


SERVER_RULES = "~nightsplit:* +@all -@admin -@dangerous"
"""Redis ACL rules of the server: full access to the keys of runs, no administration."""


def site_rules(site: str) -> str:
    """Return the Redis ACL rules of a site: in every open run, replace its own status and read the server's."""
    own, server = (f"nightsplit:{{*}}:status:{worker}" for worker in (site, SERVER))
    return f"%RW~{own} %R~{server} -@all +ping +time +lset +lindex"


class RedisStore(RunStore):
    """State of `run` at `url` ("redis://[[user]:password@]host[:port][/database]", or rediss: for TLS).

    Raises:
        ConfigError: 107 the address cannot be used, 111 it is an unencrypted one of another machine, 113 a file
            of `credentials` cannot be used.
        BrokerError: 207 the server cannot be reached or refuses the login.
    """

    def __init__(self, url: str, run: str, credentials: Credentials = NO_CREDENTIALS) -> None:
        address = read_address(url)
        self._server = str(address)
        self._redis = redis_client(address, credentials)
        # Braces keep the keys of a run on one node of a Redis cluster, as scripts require.
        self._prefix = f"nightsplit:{{{run}}}"
        self._lease, self._pointer, self._journal = (f"{self._prefix}:{of}" for of in ("lease", "pointer", "journal"))
        try:
            self._call(self._redis.ping)
        except BrokerError:
            self.close()
            raise

    @override
    def put_status(self, worker: str, status: WorkerStatus) -> None:
        # By a clock that was read before: a worker that stops in between looks silent, as it is.
        entry = json.dumps([round(self.now() * 1000), write_status(status)])
        self._call(partial(self._replace_status, self._status(worker), entry))

    def _replace_status(self, key: str, entry: str) -> None:
        try:
            self._redis.lset(key, 0, entry)
        except redis.ResponseError as error:
            if "no such key" not in str(error):
                raise
            with suppress(redis.exceptions.NoPermissionError):  # a site waits until a server has opened the run
                self._redis.rpush(key, entry)

    @override
    def admit(self, workers: Iterable[str]) -> None:
        self._run("admit", [self._status(worker) for worker in workers])

    @override
    def statuses(self, workers: Iterable[str]) -> dict[str, Status]:
        workers = list(workers)
        commands = self._redis.pipeline(transaction=False)
        for worker in workers:
            commands.lindex(self._status(worker), 0)
        found: list[Any] = self._call(partial(commands.execute, raise_on_error=False))
        for error in found:
            if isinstance(error, redis.exceptions.NoPermissionError):
                raise self._refused(error)
        now = self.now()
        return {worker: _read(worker, entry, now) for worker, entry in zip(workers, found, strict=True) if entry}

    @override
    def now(self) -> float:
        seconds, microseconds = self._call(self._redis.time)
        return float(seconds + microseconds / 1e6)

    def server(self) -> tuple[str, str]:
        """Return product, Redis or Valkey, and version of the server."""
        # Not by INFO, which sites may not use: HELLO needs no right, since it can log in.
        hello = self._call(partial(self._redis.execute_command, "HELLO"))
        return str(hello["server"]).capitalize(), str(hello["version"])

    @override
    def acquire_lease(self, owner: str, ttl_seconds: float) -> int | None:
        fence = self._run("acquire_lease", [self._lease], owner, round(ttl_seconds * 1000))
        return None if fence is None else int(fence)

    @override
    def renew_lease(self, owner: str, fence: int, ttl_seconds: float) -> bool:
        return bool(self._run("renew_lease", [self._lease], owner, fence, round(ttl_seconds * 1000)))

    @override
    def release_lease(self, owner: str, fence: int) -> None:
        self._run("release_lease", [self._lease], owner, fence)

    @override
    def pointer(self) -> Pointer | None:
        found = self._call(lambda: self._redis.hgetall(self._pointer))
        return Pointer(int(found["fence"]), int(found["counter"]), str(found["sha256"])) if found else None

    @override
    def move_pointer(self, pointer: Pointer) -> bool:
        keys = [self._lease, self._pointer]
        return bool(self._run("move_pointer", keys, pointer.fence, pointer.counter, pointer.sha256))

    @override
    def claim_position(self, position: int, entry: str) -> str:
        # Durable as far as `appendfsync` allows.
        return str(self._run("journal", [self._journal], position, entry))

    @override
    def journal_entry(self, position: int) -> str | None:
        entry = self._call(lambda: self._redis.hget(self._journal, str(position)))
        return None if entry is None else str(entry)

    def loss_at_power_cut(self) -> str | None:
        """Return which changes a power cut of Redis's host may lose, as its settings say; None for none.

        MissingRightError 207 if this user may not ask for its settings.
        """
        settings = self._call(lambda: self._redis.config_get("append*"))
        if settings["appendonly"] != "yes":
            return "all (appendonly no)"
        losses = {"everysec": "up to 2 s of them (appendfsync everysec)", "no": "up to 30 s of them (appendfsync no)"}
        return losses.get(str(settings["appendfsync"]))

    @override
    def close(self) -> None:
        self._redis.close()

    def _status(self, worker: str) -> str:
        """Return the worker's own key, since Redis grants rights by key."""
        return f"{self._prefix}:status:{worker}"

    def _run(self, script: str, keys: list[str], *arguments: str | int) -> Any:
        return self._call(lambda: self._redis.register_script(_text_of(script))(keys, arguments))

    def _call(self, command: Callable[[], T]) -> T:
        try:
            return command()
        except (redis.AuthenticationError, redis.exceptions.NoPermissionError) as error:
            raise self._refused(error) from None
        except redis.RedisError as error:
            remedy = "start Redis, or check the address of the store and the network."
            raise BrokerError(207, f"{self._server}: {error}.", remedy) from None

    def _refused(self, error: Exception) -> BrokerError:
        """Return the error for a login or an operation that Redis refuses."""
        is_right = isinstance(error, redis.exceptions.NoPermissionError)
        sentence = f"{self._server} refuses: {str(error).rstrip('.')}."
        remedy = "check user and password, and that the address names this worker's own user."
        return (MissingRightError if is_right else BrokerError)(207, sentence, remedy)


@cache
def _text_of(script: str) -> str:
    return resources.files(__package__).joinpath("lua", f"{script}.lua").read_text(encoding="utf-8")


def _read(worker: str, entry: str | Exception, now: float) -> Status:
    """Return the status in a worker's entry, or in what is there instead of a list; 1970 if it has no readable time."""
    try:
        if isinstance(entry, Exception):
            raise ValueError
        written, record = msgspec.json.decode(entry, type=tuple[float, str])
    except (msgspec.MsgspecError, ValueError, RecursionError):  # as in `read_status`
        return Status(worker, UNREADABLE, age_seconds(now, 0.0))
    return Status(worker, read_status(record, worker), age_seconds(now, written / 1000))


def redis_client(address: Address, credentials: Credentials) -> Any:
    """Return redis-py's client, which connects with its first command; ConfigError 113 as `Credentials.tls`."""
    host, port = address.places[0]
    tls: dict[str, Any] = {}
    if address.is_encrypted:
        credentials.tls()  # reports a wrong file now; redis-py would only when it connects
        tls = {
            "ssl": True,
            "ssl_cert_reqs": "required",
            "ssl_check_hostname": True,
            "ssl_min_version": ssl.TLSVersion.TLSv1_2,
            "ssl_ca_certs": credentials.ca and str(credentials.ca),
            "ssl_certfile": credentials.certificate and str(credentials.certificate),
            "ssl_keyfile": credentials.key and str(credentials.key),
        }
    return redis.Redis(
        host, port, int(address.path or 0), username=address.user, password=credentials.secret() or address.password,
        decode_responses=True,
        encoding_errors="surrogateescape",  # a site may write invalid text; the schema then refuses it
        socket_timeout=TIMEOUT_SECONDS,
        socket_connect_timeout=TIMEOUT_SECONDS,
        retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), retries=3),
        **tls,
    )  # fmt: skip
