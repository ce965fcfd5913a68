"""The server halves of the systems."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nightsplit.server_worker.protocols.data_vectors import DataVectorsServer
from nightsplit.server_worker.protocols.fedavg_dp_seg import FedavgDpSegServer
from nightsplit.server_worker.protocols.fedavg_transfer import FedavgTransferServer
from nightsplit.server_worker.protocols.split_frozen import SplitFrozenServer
from nightsplit.server_worker.protocols.split_labels import SplitLabelsServer
from nightsplit.server_worker.protocols.split_u import SplitUServer
from nightsplit.server_worker.role import ServerRole
from nightsplit.server_worker.stream.activation_store import ActivationStore
from nightsplit.server_worker.stream.ddp import DividedTop, Group
from nightsplit.server_worker.stream.top import Middle, StoredTop, Top
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.errors import ConfigError
from nightsplit.shared.protocols import ROUNDS
from nightsplit.shared.protocols.build import assemble, assemble_rounds

AnyServer = ServerRole[Any]
OF_ROUNDS = {
    "fedavg_transfer": FedavgTransferServer,
    "fedavg_dp_seg": FedavgDpSegServer,
    "data_vectors": DataVectorsServer,
}


def make_server(
    config: RunConfig, state: Path, base: Path, device: str = "cpu", group: Group | None = None
) -> AnyServer:
    """The role of the server in a run.

    Args:
        config: the run.
        state: folder for what outgrows a checkpoint (released activations).
        base: folder of run.toml.
        device: where the server's layers compute; a group knows it for each of its processes.
        group: processes that train together (split_frozen).

    Raises:
        ConfigError: 104, 105 the model cannot be used, 114 the run cannot be divided among processes.
    """
    if group is not None and config.run.protocol != "split_frozen":
        raise ConfigError(
            114,
            f"the server of {config.run.protocol} applies one message after the other, and has no work to divide.",
            "start it as a single process: nightsplit server server.toml.",
        )
    if config.run.protocol in ROUNDS:
        return OF_ROUNDS[config.run.protocol](config, assemble_rounds(config, base))
    assembly = assemble(config)
    if config.run.protocol == "split_u":
        middle = Middle(assembly.halves.top, config.optimizer, config.task, device)
        return SplitUServer(config, middle, assembly.contract)
    if config.run.protocol == "split_frozen":
        store = ActivationStore(state / "activations")
        parts = assembly.halves.top, config.optimizer, config.task
        stored = StoredTop(*parts, device, store) if group is None else DividedTop(*parts, store, group)
        return SplitFrozenServer(config, stored, assembly.contract)
    top = Top(assembly.halves.top, config.optimizer, config.task, device)
    return SplitLabelsServer(config, top, assembly.contract)
