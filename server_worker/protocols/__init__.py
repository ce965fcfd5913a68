"""The server halves of the systems."""

from __future__ import annotations

from pathlib import Path

from server_worker.activation_store import ActivationStore
from server_worker.protocols.split_frozen import SplitFrozenServer
from server_worker.protocols.split_labels import SplitLabelsServer
from server_worker.protocols.split_u import SplitUServer
from server_worker.protocols.stream import StreamServer
from server_worker.top import Middle, Top
from shared.config import RunConfig
from shared.protocols.assembly import assemble


def make_server(config: RunConfig, state: Path, device: str = "cpu") -> StreamServer:
    """The role of the server in a run.

    Args:
        config: the run.
        state: folder for what outgrows a checkpoint (released activations).
        device: where the server's layers compute.

    Raises:
        ConfigError: 104, 105 the model cannot be used.
    """
    assembly = assemble(config)
    if config.run.protocol == "split_u":
        middle = Middle(assembly.halves.top, config.optimizer, config.task, device)
        return SplitUServer(config, middle, assembly.contract)
    top = Top(assembly.halves.top, config.optimizer, config.task, device)
    if config.run.protocol == "split_frozen":
        return SplitFrozenServer(config, top, assembly.contract, ActivationStore(state / "activations"))
    return SplitLabelsServer(config, top, assembly.contract)
