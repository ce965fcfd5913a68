"""Roles without a disk: released activations are kept in memory, and noise comes from a fixed secret."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from typing_extensions import override

from nightsplit.server_worker.protocols import AnyServer, make_server_role
from nightsplit.server_worker.protocols.split_frozen import SplitFrozenServer
from nightsplit.server_worker.stream.activation_store import ActivationStore
from nightsplit.server_worker.stream.top import StoredTop
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.engine.effects import Spend
from nightsplit.shared.protocols.build import SplitModel, WholeModel, build_model
from nightsplit.site_worker.privacy.batches import PrivateBatches
from nightsplit.site_worker.privacy.secret import Secret
from nightsplit.site_worker.privacy.trainer import PrivateTrainer
from nightsplit.site_worker.protocols import ROLES, make_site
from nightsplit.site_worker.role import Account, SiteRole
from tests.harness.night import tiny_splits

NOWHERE = Path("/nowhere")
"""A folder that does not exist, and is not made: a role that wrote to it would fail."""
SIGMA = 1.0
RATE = 0.5


class ActivationsInMemory(ActivationStore):
    """Released activations that a server's next process finds again if the test hands them on."""

    def __init__(self) -> None:
        self._items: dict[tuple[str, int], dict[str, torch.Tensor]] = {}

    @override
    def put(self, site: str, q: int, tensors: Mapping[str, torch.Tensor]) -> None:
        self._items[site, q] = {name: tensor.clone() for name, tensor in tensors.items()}

    @override
    def get(self, site: str, q: int, rows: Sequence[int] | None = None) -> dict[str, torch.Tensor]:
        item = self._items[site, q]
        return item if rows is None else {name: tensor[list(rows)] for name, tensor in item.items()}


class EffectsAlone(Account):
    """An account that is not paid from: the role says when it must be, and that is what a test looks at."""

    @override
    def pay(self, spend: Spend) -> None:
        raise AssertionError("an engine pays")

    @override
    def close(self) -> None:
        pass


def pure_server(config: RunConfig, activations: ActivationStore | None = None, state: Path | None = None) -> AnyServer:
    """The server's role; `activations` are released ones, in split_frozen, `state` is its folder for blocks."""
    if config.run.protocol != "split_frozen":
        return make_server_role(config, state or NOWHERE, NOWHERE)
    model = build_model(config, NOWHERE)
    assert isinstance(model, SplitModel)
    store = activations or ActivationsInMemory()
    top = StoredTop(model.parts.top, config.optimizer.of("top"), config.task, "cpu", store)
    return SplitFrozenServer(config, top, model)


def pure_site(config: RunConfig, name: str, incarnation: int = 1) -> SiteRole:
    """A site's role; in a private run its noise is the same in every process of the site."""
    splits, this = tiny_splits(name), f"{name}-{incarnation}"
    if config.privacy is None:
        return make_site(name, config, splits, this, NOWHERE)
    model = build_model(config, NOWHERE)
    assert isinstance(model, WholeModel)
    secret = Secret(name.encode().ljust(32))
    batch = RATE * len(splits.train)
    trainer = PrivateTrainer(model.module, config, "cpu", config.privacy, secret, SIGMA, batch)
    batches = PrivateBatches(config, name, splits, secret, RATE)
    site: SiteRole = ROLES[config.run.protocol, config.run.learning](
        name, config, model, trainer, batches, this, EffectsAlone()
    )
    return site
