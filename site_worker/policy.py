"""The hospital decides: what a run asks for, held against the hospital's policy.toml."""

from __future__ import annotations

from pathlib import Path

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.errors import ConfigError
from nightsplit.shared.protocols import ROUNDS
from nightsplit.site_worker.config import PolicyConfig

SENDS_LABELS = frozenset({"split_labels", "split_frozen"})
STORES_ACTIVATIONS = frozenset({"split_frozen"})


def check_policy(policy: PolicyConfig, run: RunConfig, source: Path) -> None:
    """Refuse a run that asks for more than the policy allows.

    A smaller batch at the end of an epoch is the loader's business; here the run's batch size counts.

    Args:
        policy: what may leave the hospital.
        run: what the run asks for.
        source: the policy's file, for the message.

    Raises:
        ConfigError: 108 with every key that the hospital would have to change.
    """
    protocol = run.run.protocol
    denied = []
    if protocol in SENDS_LABELS and not policy.labels:
        denied.append("labels = true (labels leave with their activations)")
    if protocol in STORES_ACTIVATIONS and not policy.stored_activations:
        denied.append("stored_activations = true (the server keeps activations and trains on them again)")
    if run.run.bottoms == "averaged" and not policy.bottom_weights:
        denied.append("bottom_weights = true (weights of the site's layers leave, to be averaged)")
    if protocol in ROUNDS and not policy.model_weights:
        denied.append("model_weights = true (what training at the site changes in the whole model leaves)")
    if run.run.tape and not policy.tape:
        denied.append("tape = true (the server keeps every message of the run on its disk)")
    if policy.max_epsilon is not None and run.privacy is None:
        denied.append("no max_epsilon (the run has no [privacy], so nothing bounds what it spends)")
    if run.run.batch_size < policy.min_batch:
        denied.append(f"min_batch = {run.run.batch_size} (run.batch_size; the policy says {policy.min_batch})")
    if denied:
        raise ConfigError(
            108,
            f"{source}: run {run.run.id!r} ({protocol}) needs {', '.join(denied)}.",
            "change the run; or let the hospital decide to set these keys in its policy.",
        )
