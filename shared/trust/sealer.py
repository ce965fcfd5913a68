"""Sealer of a participant, from its configuration."""

from pathlib import Path

from nightsplit.shared.address import DEFAULT_PORTS, is_loopback, read_address
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.errors import ConfigError
from nightsplit.shared.trust.envelope import Sealer
from nightsplit.shared.trust.identity import PublicKey, read_identity
from nightsplit.shared.trust.run_keys import RunKeys


def make_sealer(run: RunConfig, name: str, identity: Path | None, state: Path, broker: str) -> Sealer | None:
    """Make the sealer of a participant; None if the run has no keys.

    Args:
        name: name of the participant in the run.
        identity: file of its private key.
        state: its state folder, where the keys of the run are kept.
        broker: address of the broker.

    Raises:
        ConfigError: 113 the identity cannot be read, 121 a run without keys would leave this machine, 122 the identity
            is not the one that run.toml names.
    """
    if not run.parties:
        is_file = broker.partition(":")[0] not in DEFAULT_PORTS
        if not (is_file or all(is_loopback(host) for host, _ in read_address(broker).places)):
            sentence = f"{run.run.id} has no [parties], so anyone at the broker could read, forge or repeat messages."
            raise ConfigError(121, sentence, "add the table that nightsplit keys parties prints to run.toml.")
        return None
    if name not in run.parties:
        return None  # not part of the run, which its worker says
    if identity is None:
        remedy = "add identity to this worker's file: the key that nightsplit keys made for it."
        raise ConfigError(122, f"run.toml has a public key for {name}, and {name} has no identity.", remedy)
    key = read_identity(identity)
    if key.public.text != run.parties[name]:
        sentence = f"{identity} belongs to {key.public.text}, and run.toml names {run.parties[name]} for {name}."
        raise ConfigError(
            122, sentence, "use the identity of that key, or have its public key put into a new run.toml."
        )
    parties = {party: PublicKey(text) for party, text in run.parties.items()}
    return Sealer(run.run.id, run.digest, name, key, parties, RunKeys(state / "run_keys"))
