"""One top, trained by several processes on stored activations (DistributedDataParallel, Li et al., VLDB 2020).

    torchrun --standalone --nproc-per-node 2 -m nightsplit server server.toml

    rank 0    the server worker: it alone consumes, stores, chooses rows, evaluates, saves and publishes
    others    helpers: they read the same activation store, and compute

    rank 0 ────── state ───────▶ helpers    before its first step
           ────── rows, seed ──▶            each step; every rank computes a share of the rows,
           ◀───── gradients ───▶            and all apply the mean over all rows to equal weights
           ────── leave ───────▶

Helpers keep nothing: whatever dies, the same command starts all of them again from rank 0's checkpoint.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from safetensors.torch import load, save
from torch import distributed, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from nightsplit.server_worker.stream.activation_store import ActivationStore, Row
from nightsplit.server_worker.stream.top import StoredTop
from nightsplit.shared.config.run import OptimizerSection, TaskSection
from nightsplit.shared.errors import ConfigError, Refused, StateError
from nightsplit.shared.learning.bounds import buffers_kept, check_step
from nightsplit.shared.learning.losses import loss_of
from nightsplit.shared.learning.seeds import seeded

STATE, STEP, LEAVE = range(3)
"""What rank 0 says to the helpers."""

NIGHTS = timedelta(days=365)
"""How long a helper waits for a word: sites collect for as long as they like."""
STEP_TIMEOUT = timedelta(minutes=5)
"""How long a rank waits for the others within a step; one that is stopped and not dead holds them up."""


def device_of_rank(device: str) -> str:
    """Where this process computes: each of several has a GPU of its own; ConfigError 114 when `device` is one GPU."""
    if not _is_one_of_several() or not device.startswith("cuda"):
        return device
    if device != "cuda":
        what = f"device {device!r} is one GPU for {os.environ['WORLD_SIZE']} processes."
        raise ConfigError(114, what, 'write device = "cuda": each process takes one of its own.')
    return f"cuda:{os.environ['LOCAL_RANK']}"


def is_helper() -> bool:
    """Whether torchrun started this process to help another."""
    return _is_one_of_several() and os.environ["RANK"] != "0"


def _is_one_of_several() -> bool:
    return distributed.is_torchelastic_launched() and os.environ["WORLD_SIZE"] != "1"


@contextmanager
def joined_group(device: str) -> Iterator[Group | None]:
    """The group that torchrun made this process a part of, else None; StateError 509 when the others do not come."""
    if not _is_one_of_several():
        yield None
        return
    group = Group(device)
    try:
        yield group
    finally:
        group.leave()


class Group:
    """The processes that torchrun started for one server, as one of them sees it.

    Args:
        device: as `device_of_rank` gives it.

    Attributes:
        rank, size: of this process, and of the group.
        device: where this process computes.
    """

    def __init__(self, device: str) -> None:
        self.rank, self.size, self.device = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), device
        if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
            _stay_on_this_machine()
        with _others_alive():
            if device.startswith("cuda"):
                torch.cuda.set_device(device)
            distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=STEP_TIMEOUT)
            # Words go through memory and sockets: a GPU would spin for a night while it waits for one.
            self._words: Any = distributed.new_group(backend="gloo", timeout=NIGHTS)

    def say(self, word: int, body: bytes = b"") -> None:
        """Rank 0: tell the helpers; they `hear` it."""
        with _others_alive():
            distributed.broadcast(torch.tensor([word, len(body)]), 0, group=self._words)
            if body:
                distributed.broadcast(torch.frombuffer(bytearray(body), dtype=torch.uint8), 0, group=self._words)

    def hear(self) -> tuple[int, bytes]:
        """A helper: wait for the next word of rank 0."""
        with _others_alive():
            distributed.broadcast(header := torch.empty(2, dtype=torch.int64), 0, group=self._words)
            word, length = header.tolist()
            if length:
                distributed.broadcast(body := torch.empty(length, dtype=torch.uint8), 0, group=self._words)
        return word, body.numpy().tobytes() if length else b""

    def leave(self) -> None:
        """End this process's part; rank 0 takes the helpers along."""
        with suppress(StateError):  # those who are gone need not be told
            if self.rank == 0:
                self.say(LEAVE)
        distributed.destroy_process_group()


class DividedTop(StoredTop):
    """A top whose steps the processes of a group divide among them.

    Args:
        group: this process's.
        Others as in `StoredTop`.

    Raises:
        ConfigError: 114 the layers need a whole batch in one place.
    """

    def __init__(
        self, module: nn.Module, optimizer: OptimizerSection, task: TaskSection, store: ActivationStore, group: Group
    ) -> None:
        if any(isinstance(part, _BatchNorm) for part in module.modules()):
            if group.device == "cpu":
                what = "batch normalisation needs the whole batch, and on the CPU each process has a share of it."
                raise ConfigError(114, what, "use GroupNorm, or a single process.")
            module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
        super().__init__(module, optimizer, task, group.device, store)
        self._group = group
        self._parallel: DistributedDataParallel | None = None

    def train_stored(self, rows: Sequence[Row], seed: int) -> float:
        """Rank 0: see `StoredTop`."""
        if self._parallel is None:
            self._group.say(STATE, save({name: tensor.contiguous() for name, tensor in self.state().items()}))
            self._parallel = self._wrapped()
        self._group.say(STEP, json.dumps([rows, seed]).encode())
        return self._step(rows, seed)

    def help(self) -> None:
        """A helper: compute what rank 0 says, until it leaves."""
        while True:
            word, body = self._group.hear()
            if word == LEAVE:
                return
            if word == STATE:
                self.restore(load(body))
                self._parallel = self._wrapped()
            else:
                with suppress(Refused):  # every rank refuses, and rank 0 counts it
                    self._step(*json.loads(body))

    def _wrapped(self) -> DistributedDataParallel:
        # Looking for unused parameters keeps the gradients' place in their buckets, and with it the order of
        # their sum, the same in the first step and all later ones: so a restart repeats it to the bit.
        with _others_alive():
            return DistributedDataParallel(self.module, find_unused_parameters=True)

    def _step(self, rows: Sequence[Row], seed: int) -> float:
        share = Share.of(self._group, len(rows))
        smashed, targets = self.store.gather(rows[share.first : share.last])
        assert self._parallel is not None
        self.module.train()
        with _others_alive(), buffers_kept(self.module):
            with seeded(seed, self._device), share:
                outputs = self._parallel(smashed.to(self._device))
                loss = loss_of(self._task, outputs, targets.to(self._device)) * share.weight
            distributed.all_reduce(total := loss.detach().clone())
            self._optimizer.zero_grad()
            torch.autograd.backward(loss * self._group.size)  # DDP takes the mean over ranks; the sum is meant
            check_step(self.module, total)  # equal at every rank, and so is what becomes of it
        self._optimizer.step()
        return total.item()


class Share(TorchFunctionMode):
    """One rank's rows [first, last) of a step, and its part of what dropout draws for the whole step.

    Every rank draws for all rows, from the same seed, and takes its own: so dropout drops what it would
    in a single process. Other random functions draw for the share alone.
    """

    def __init__(self, first: int, last: int, total: int, weight: float) -> None:
        super().__init__()
        self.first, self.last, self.total, self.weight = first, last, total, weight

    @classmethod
    def of(cls, group: Group, total: int) -> Share:
        """The share of this process in `total` rows: as even as can be."""
        first, last = total * group.rank // group.size, total * (group.rank + 1) // group.size
        if first == last:  # DDP waits for every rank: one without rows computes the first row, for nothing
            return cls(0, 1, total, 0.0)
        return cls(first, last, total, (last - first) / total)

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function not in _DROPOUTS:
            return function(*args, **(kwargs or {}))
        inputs, *settings = args
        per_row = len(inputs) // (self.last - self.first)
        ones = inputs.new_ones(per_row * self.total, *inputs.shape[1:])
        scale = function(ones, *settings, **(kwargs or {}))
        return inputs * scale[per_row * self.first : per_row * self.last]


_DROPOUTS = {functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d}


def _stay_on_this_machine() -> None:
    """What the ranks say to each other is neither encrypted nor signed: use the loopback device alone."""
    for _, name in socket.if_nameindex():
        if name in ("lo", "lo0"):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


@contextmanager
def _others_alive() -> Iterator[None]:
    """Say what it means when a collective operation fails: gloo has no error of its own, NCCL does."""
    try:
        yield
    except RuntimeError as error:
        told = str(error)
        if not isinstance(error, distributed.DistError) and "gloo" not in told:
            raise
        reason = told.partition("] ")[2].partition(". ")[0] or told.splitlines()[0]
        what = f"{reason}."
        raise StateError(509, what, "start the same command again: it continues from the last checkpoint.") from None
