"""The hospital's policy.toml, checked against a run at its start and against each message."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from typing_extensions import override

from nightsplit.shared.config.load import load
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.engine import mailbox
from nightsplit.shared.errors import ConfigError
from nightsplit.shared.wire.message import FROM_SITES, Header
from nightsplit.shared.wire.schema import BATCH, TELLS, Contract, Payload, Reveals
from nightsplit.site_worker.config import PolicyConfig

SETS_WEIGHTS = "server_sets_weights = true (the server may replace weights of layers at the site)"
REMEDY = "change the run; or let the hospital decide to set this in its policy."


def read_policy(path: Path) -> PolicyConfig:
    """Return the policy of a file, or the default policy if there is no file; raises ConfigError 101 to 103."""
    return load(path, PolicyConfig) if path.exists() else PolicyConfig()


def check_policy(
    policy: PolicyConfig, run: RunConfig, contract: Contract, source: Path, counts: Mapping[str, int] | None = None
) -> None:
    """Refuse a run that asks for more than the policy allows.

    Args:
        contract: payloads of the run by kind, from `sketch` or a role.
        source: the policy's file, for the error.
        counts: samples of each split of the site's data, once they are read.

    Raises:
        ConfigError: 108 with every key that the hospital would have to change.
    """
    payloads = contract.values()
    denied = _find_denied(policy, run, payloads)
    sent = [spec for payload in payloads if payload.kind in FROM_SITES for spec in payload.tensors.values()]
    if any(BATCH in spec.shape for spec in sent):
        denied += [
            f"min_batch = {samples} (all of its {part} samples; the policy says {policy.min_batch})"
            for part, samples in (counts or {}).items()
            if 0 < samples < policy.min_batch
        ]
    if denied:
        raise ConfigError(108, f"{source}: run {run.run.id!r} ({run.run.protocol}) needs {', '.join(denied)}.", REMEDY)


def is_allowed(policy: PolicyConfig, revealed: Reveals) -> bool:
    """Return whether a message may reveal this."""
    return revealed in (*policy.allowed, Reveals.NOTHING)


class Gate(mailbox.Gate):
    """Check of each message against the policy; ConfigError 101 to 103 if it cannot be read at first.

    The policy is read again when its file has changed, so a stricter policy holds the next message. While the file
    cannot be read, no message leaves and none sets weights.
    """

    def __init__(self, path: Path, run: RunConfig) -> None:
        self._path, self._run = path, run
        self._stamp = _stamp(path)
        self._policy = read_policy(path)

    @override
    def check_out(self, header: Header, payload: Payload, samples: int | None) -> None:
        policy = self._read_again()
        denied = _find_denied(policy, self._run, [payload])
        if samples is not None and samples < policy.min_batch:
            denied.append(f"min_batch = {samples} (samples in this message; the policy says {policy.min_batch})")
        self._refuse(header, denied, "It was not sent")

    @override
    def check_in(self, header: Header, payload: Payload) -> None:
        policy = self._read_again()
        denied = _find_distrusted(policy, self._run)
        if payload.sets_weights and not policy.server_sets_weights:
            denied.append(SETS_WEIGHTS)
        self._refuse(header, denied, "It was not applied, and stays at the broker")

    def _refuse(self, header: Header, denied: Sequence[str], outcome: str) -> None:
        if denied:
            raise ConfigError(108, f"{self._path}: {header.message_id} needs {', '.join(denied)}. {outcome}.", REMEDY)

    def _read_again(self) -> PolicyConfig:
        stamp = _stamp(self._path)
        if stamp != self._stamp:
            try:
                self._policy = load(self._path, PolicyConfig)  # not the default one: a deleted file permits nothing
            except ConfigError as error:
                raise ConfigError(108, f"the policy cannot be read: {error.sentence}", error.remedy) from None
            self._stamp = stamp
        return self._policy


def _find_denied(policy: PolicyConfig, run: RunConfig, payloads: Collection[Payload]) -> list[str]:
    """List the settings that the policy lacks for these payloads of a run."""
    required = {revealed for payload in payloads if payload.kind in FROM_SITES for revealed in payload.reveals}
    denied = [
        f'"{revealed}" in allowed ({TELLS[revealed]})'
        for revealed in Reveals
        if revealed in required and not is_allowed(policy, revealed)
    ]
    if any(payload.sets_weights for payload in payloads) and not policy.server_sets_weights:
        denied.append(SETS_WEIGHTS)
    if (module := run.model.package) and not any(f"{module}.".startswith(f"{listed}.") for listed in policy.packages):
        denied.append(f'"{module}" in packages (code of this package would build the model)')
    if run.run.tape and not policy.tape:
        denied.append("tape = true (the server keeps every message of the run on its disk)")
    if policy.max_epsilon is not None and run.privacy is None:
        denied.append("no max_epsilon (the run has no [privacy], so its epsilon has no bound)")
    if run.run.batch_size < policy.min_batch:
        denied.append(f"min_batch = {run.run.batch_size} (run.batch_size; the policy says {policy.min_batch})")
    return denied + _find_distrusted(policy, run)


def _find_distrusted(policy: PolicyConfig, run: RunConfig) -> list[str]:
    """List the participants whose keys the policy distrusts."""
    return [f"trust in the key of {name} (distrusted)" for name, key in run.parties.items() if key in policy.distrusted]


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Return a value that changes with the file; None if there is none to be read."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
