"""The run store in Redis, for servers on several hosts. Each change is one script, so it is atomic.

Redis must run with `appendonly yes`. With `appendfsync everysec` what a method returned survives the
death of any process, the Redis server's included, but not a host that crashes within the second;
the journal and the pointer of a run that must survive that too need `appendfsync always`. All times
are the Redis server's own, so clocks of workers may differ.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import urlsplit

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from shared.errors import BrokerError, ConfigError
from shared.message import Scalar
from shared.store import Pointer, RunStore, Status

TIMEOUT_SECONDS = 5.0

NOW = "local t = redis.call('TIME') local now = t[1] * 1000 + math.floor(t[2] / 1000) "

# KEYS: lease, a hash of fence, owner, expires (milliseconds). ARGV: owner, ttl in milliseconds.
ACQUIRE = (
    NOW
    + """
local lease = redis.call('HMGET', KEYS[1], 'owner', 'expires')
if lease[1] and lease[1] ~= ARGV[1] and now < tonumber(lease[2]) then return false end
redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'expires', now + ARGV[2])
return redis.call('HINCRBY', KEYS[1], 'fence', 1)
"""
)

# ARGV: owner, fence, ttl in milliseconds.
RENEW = (
    NOW
    + """
local lease = redis.call('HMGET', KEYS[1], 'owner', 'fence')
if lease[1] ~= ARGV[1] or lease[2] ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], 'expires', now + ARGV[3])
return 1
"""
)

# ARGV: owner, fence. The fence stays, since the next one must be larger.
RELEASE = """
local lease = redis.call('HMGET', KEYS[1], 'owner', 'fence')
if lease[1] == ARGV[1] and lease[2] == ARGV[2] then redis.call('HDEL', KEYS[1], 'owner') end
"""

# KEYS: lease, pointer. ARGV: fence, counter, sha256.
MOVE = """
if tonumber(redis.call('HGET', KEYS[1], 'fence') or 0) > tonumber(ARGV[1]) then return 0 end
redis.call('HSET', KEYS[2], 'fence', ARGV[1], 'counter', ARGV[2], 'sha256', ARGV[3])
return 1
"""

# KEYS: journal. ARGV: position, sender.
JOURNAL = """
redis.call('HSETNX', KEYS[1], ARGV[1], ARGV[2])
return redis.call('HGET', KEYS[1], ARGV[1])
"""

# KEYS: statuses. ARGV: worker, facts.
PUT_STATUS = NOW + "redis.call('HSET', KEYS[1], ARGV[1], cjson.encode({now, ARGV[2]}))"

STATUSES = NOW + "return {now, redis.call('HGETALL', KEYS[1])}"

T = TypeVar("T")


class RedisStore(RunStore):
    """State of `run` at `url` ("redis://[[user]:password@]host[:port][/database]", or rediss: for TLS).

    Raises:
        ConfigError: 107 when `url` is not an address of Redis.
        BrokerError: 207 when the server cannot be reached or refuses the login.
    """

    def __init__(self, url: str, run: str) -> None:
        try:
            address = urlsplit(url)
            self._place = f"{address.scheme}://{address.hostname}:{address.port or 6379}"  # without the password
            self._redis = redis.Redis.from_url(
                url,
                decode_responses=True,
                socket_timeout=TIMEOUT_SECONDS,
                socket_connect_timeout=TIMEOUT_SECONDS,
                retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), retries=3),
            )
        except ValueError:  # Its text may hold the password.
            raise ConfigError(
                107, "the store's address is not one of Redis.", 'write "redis://user:password@host:6379/0".'
            ) from None
        # Braces keep the keys of a run on one node of a Redis cluster, as scripts require.
        self._lease, self._pointer, self._journal, self._statuses = (
            f"nightsplit:{{{run}}}:{name}" for name in ("lease", "pointer", "journal", "statuses")
        )
        try:
            self._ask(self._redis.ping)
        except BrokerError:
            self.close()
            raise

    def put_status(self, worker: str, facts: Mapping[str, Scalar | None]) -> None:
        """See `RunStore`."""
        self._run(PUT_STATUS, [self._statuses], worker, json.dumps(dict(facts)))

    def statuses(self) -> dict[str, Status]:
        """See `RunStore`."""
        now, found = self._run(STATUSES, [self._statuses])
        statuses = {}
        for worker, entry in zip(found[::2], found[1::2], strict=True):
            written, facts = json.loads(entry)
            statuses[worker] = Status(worker, json.loads(facts), max(0.0, (now - written) / 1000))
        return statuses

    def acquire_lease(self, owner: str, ttl_seconds: float) -> int | None:
        """See `RunStore`."""
        fence = self._run(ACQUIRE, [self._lease], owner, round(ttl_seconds * 1000))
        return None if fence is None else int(fence)

    def renew_lease(self, owner: str, fence: int, ttl_seconds: float) -> bool:
        """See `RunStore`."""
        return bool(self._run(RENEW, [self._lease], owner, fence, round(ttl_seconds * 1000)))

    def release_lease(self, owner: str, fence: int) -> None:
        """See `RunStore`."""
        self._run(RELEASE, [self._lease], owner, fence)

    def pointer(self) -> Pointer | None:
        """See `RunStore`."""
        found = self._ask(lambda: self._redis.hgetall(self._pointer))
        return Pointer(int(found["fence"]), int(found["counter"]), found["sha256"]) if found else None

    def move_pointer(self, pointer: Pointer) -> bool:
        """See `RunStore`."""
        keys = [self._lease, self._pointer]
        return bool(self._run(MOVE, keys, pointer.fence, pointer.counter, pointer.sha256))

    def journal(self, position: int, sender: str) -> str:
        """See `RunStore`; how durable it is depends on `appendfsync`."""
        return str(self._run(JOURNAL, [self._journal], position, sender))

    def journalled(self, position: int) -> str | None:
        """See `RunStore`."""
        sender = self._ask(lambda: self._redis.hget(self._journal, str(position)))
        return None if sender is None else str(sender)

    def clear(self) -> None:
        """See `RunStore`."""
        self._ask(lambda: self._redis.delete(self._lease, self._pointer, self._journal, self._statuses))

    def close(self) -> None:
        """See `RunStore`."""
        self._redis.close()

    def _run(self, script: str, keys: list[str], *arguments: str | int) -> Any:
        return self._ask(lambda: self._redis.register_script(script)(keys, arguments))

    def _ask(self, command: Callable[[], T]) -> T:
        try:
            return command()
        except redis.AuthenticationError as error:
            raise BrokerError(
                207,
                f"{self._place} refuses the login: {error}.",
                "check user and password in the address of the store.",
            ) from None
        except redis.RedisError as error:
            raise BrokerError(
                207, f"{self._place}: {error}.", "start Redis, or check the address of the store and the network."
            ) from None
