"""Server roles of all protocols."""

from pathlib import Path
from typing import Any

from nightsplit.server_worker.role import ServerRole
from nightsplit.server_worker.rounds.role import RoundServer
from nightsplit.server_worker.stream.ddp import Group
from nightsplit.server_worker.stream.role import StreamServer
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.errors import ConfigError
from nightsplit.shared.protocols.build import WholeModel, build_model
from nightsplit.shared.protocols.spec import load_roles, spec_of

AnyServer = ServerRole[Any]
ROLES = load_roles(__name__)


def make_server_role(
    config: RunConfig, state: Path, base: Path, device: str = "cpu", group: Group | None = None
) -> AnyServer:
    """Return the role of the server in a run.

    Args:
        state: folder for data too large for a checkpoint (released activations).
        base: folder of run.toml.
        device: device of the server's layers; in a group, this process's own.
        group: processes that train together on the released activations (split_frozen).

    Raises:
        ConfigError: 104, 105 the model cannot be used, 114 the run cannot be divided among processes.
    """
    if group is not None and not spec_of(config).uploads_once:
        sentence = f"the server of {config.run.protocol} applies one message after the other, so it cannot be divided."
        raise ConfigError(114, sentence, "start it as a single process: nightsplit server server.toml.")
    model = build_model(config, base)
    if isinstance(model, WholeModel):
        round_class: type[RoundServer] = ROLES[config.run.protocol, config.run.learning]
        return round_class(config, model)
    stream_class: type[StreamServer] = ROLES[config.run.protocol, config.run.learning]
    return stream_class.make(config, model, state, device, group)
