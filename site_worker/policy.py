"""The hospital decides: what a run asks for, and each message on its way out, held against policy.toml."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from nightsplit.shared.config.load import load
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.errors import ConfigError
from nightsplit.shared.wire.message import FROM_SITES, Header
from nightsplit.shared.wire.schema import BATCH, TELLS, Contract, Payload, Reveals
from nightsplit.site_worker.config import PolicyConfig

SETS_WEIGHTS = "server_sets_weights = true (what the server sends replaces weights of layers that work here)"
REMEDY = "change the run; or let the hospital decide to set this in its policy."


def read_policy(path: Path) -> PolicyConfig:
    """Return the policy of a file, the default one where there is none; raises ConfigError 101 to 103."""
    return load(path, PolicyConfig) if path.exists() else PolicyConfig()


def check_policy(
    policy: PolicyConfig, run: RunConfig, contract: Contract, source: Path, counts: Mapping[str, int] | None = None
) -> None:
    """Refuse a run that asks for more than the policy allows.

    Args:
        policy: of the hospital.
        run: what the run asks for.
        contract: all of the run's messages, as `sketch` or a role has it.
        source: the policy's file, for the message.
        counts: samples of each part of the site's data, once they are known.

    Raises:
        ConfigError: 108 with every key that the hospital would have to change.
    """
    payloads = contract.values()
    denied = _denied(policy, run, payloads)
    sent = [spec for payload in payloads if payload.kind in FROM_SITES for spec in payload.tensors.values()]
    if any(BATCH in spec.shape for spec in sent):
        denied += [
            f"min_batch = {samples} (all of its {part} samples; the policy says {policy.min_batch})"
            for part, samples in (counts or {}).items()
            if 0 < samples < policy.min_batch
        ]
    if denied:
        raise ConfigError(108, f"{source}: run {run.run.id!r} ({run.run.protocol}) needs {', '.join(denied)}.", REMEDY)


class Gate:
    """Lets a message leave the hospital, or not.

    It is asked for each message, and reads the policy again when its file has changed: a stricter policy holds the
    next message. While the file cannot be read, nothing leaves and nothing sets weights.

    Args:
        path: policy.toml.
        run: the run whose messages are sent.

    Raises:
        ConfigError: 101-103 the policy cannot be read.
    """

    def __init__(self, path: Path, run: RunConfig) -> None:
        self._path, self._run = path, run
        self._stamp = _stamp(path)
        self._policy = read_policy(path)

    def check_out(self, header: Header, payload: Payload, samples: int | None) -> None:
        """See `nightsplit.shared.engine.mailbox.Gate`."""
        policy = self._present()
        denied = _denied(policy, self._run, [payload])
        if samples is not None and samples < policy.min_batch:
            denied.append(f"min_batch = {samples} (the samples that it holds; the policy says {policy.min_batch})")
        self._hold(header, denied, "It was not sent")

    def check_in(self, header: Header, payload: Payload) -> None:
        """See `nightsplit.shared.engine.mailbox.Gate`."""
        if payload.sets_weights and not self._present().server_sets_weights:
            self._hold(header, [SETS_WEIGHTS], "It was not obeyed, and waits at the broker")

    def _hold(self, header: Header, denied: Sequence[str], so: str) -> None:
        if denied:
            raise ConfigError(108, f"{self._path}: {header.message_id} needs {', '.join(denied)}. {so}.", REMEDY)

    def _present(self) -> PolicyConfig:
        stamp = _stamp(self._path)
        if stamp != self._stamp:
            try:
                self._policy = load(self._path, PolicyConfig)  # one that is gone is no permission
            except ConfigError as error:
                raise ConfigError(108, f"the policy cannot be read: {error.sentence}", error.remedy) from None
            self._stamp = stamp
        return self._policy


def _denied(policy: PolicyConfig, run: RunConfig, payloads: Collection[Payload]) -> list[str]:
    """What the hospital would have to set for these payloads of a run."""
    asked = {revealed for payload in payloads if payload.kind in FROM_SITES for revealed in payload.reveals}
    denied = [
        f'"{revealed}" in allowed ({TELLS[revealed]})'
        for revealed in Reveals
        if revealed in asked and revealed not in (*policy.allowed, Reveals.NOTHING)
    ]
    if any(payload.sets_weights for payload in payloads) and not policy.server_sets_weights:
        denied.append(SETS_WEIGHTS)
    if run.run.tape and not policy.tape:
        denied.append("tape = true (the server keeps every message of the run on its disk)")
    if policy.max_epsilon is not None and run.privacy is None:
        denied.append("no max_epsilon (the run has no [privacy], so nothing bounds what it spends)")
    if run.run.batch_size < policy.min_batch:
        denied.append(f"min_batch = {run.run.batch_size} (run.batch_size; the policy says {policy.min_batch})")
    return denied


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes with a file; None where there is none that can be looked at."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
