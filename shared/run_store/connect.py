"""Connection to a run store by address."""

from pathlib import Path

from nightsplit.shared.credentials import NO_CREDENTIALS, Credentials
from nightsplit.shared.errors import ConfigError
from nightsplit.shared.run_store.base import RunStore
from nightsplit.shared.run_store.redis import RedisStore
from nightsplit.shared.run_store.sqlite import SqliteStore


def open_store(address: str, run: str, base: Path, credentials: Credentials = NO_CREDENTIALS) -> RunStore:
    """Open the store of a run at "sqlite:file" (relative to the folder `base`), "redis://..." or "rediss://...".

    Raises:
        ConfigError: 107 for any other address, 111 for an unencrypted connection to another machine, 113 for a
            file of `credentials`.
        BrokerError: 207 the store cannot be reached.
    """
    scheme, _, rest = address.partition(":")
    if scheme == "sqlite" and rest:
        return SqliteStore(base / rest, run)
    if scheme in ("redis", "rediss"):
        return RedisStore(address, run, credentials)
    sentence = f'the store\'s address has the unknown scheme "{scheme}".'
    raise ConfigError(107, sentence, 'write "sqlite:file" for one host, or "rediss://user@host:6379/0".')
