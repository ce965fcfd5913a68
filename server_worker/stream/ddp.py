"""Training of one top by several processes on stored activations (DistributedDataParallel, Li et al., VLDB 2020).

    torchrun --standalone --nproc-per-node 2 -m nightsplit server server.toml

    rank 0    the server worker, which alone consumes, stores, chooses rows, evaluates, saves and publishes
    others    helpers, which read the same activation store, and compute

    rank 0 ────── state ───────▶ helpers    before its first step
           ────── rows, seed ──▶            each step; every rank computes a share of the rows,
           ◀───── gradients ───▶            and all apply the mean over all rows to equal weights
           ────── exit ────────▶

Helpers keep no state: after any failure, the same command starts all of them again from rank 0's checkpoint.
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
from typing_extensions import override

from nightsplit.server_worker.stream.activation_store import ActivationStore, Row
from nightsplit.server_worker.stream.top import StoredTop
from nightsplit.shared.config.optimizer import OptimizerSection
from nightsplit.shared.config.run import TaskSection
from nightsplit.shared.errors import ConfigError, Refused, StateError
from nightsplit.shared.learning.bounds import buffers_kept, check_step
from nightsplit.shared.learning.losses import loss_of
from nightsplit.shared.learning.optimizers import Progress
from nightsplit.shared.learning.seeds import seeded

STATE, STEP, EXIT = range(3)
"""Commands of rank 0 to the helpers."""

COMMAND_TIMEOUT = timedelta(days=365)
"""Longest time that a helper waits for a command: sites may take any time to release their activations."""
STEP_TIMEOUT = timedelta(minutes=5)
"""Longest time that a rank waits for the others within a step; a rank may be stopped and not dead."""


def device_of_rank(device: str) -> str:
    """Return the device of this process, a GPU of its own in a group; ConfigError 114 when `device` is one GPU."""
    if not _is_distributed() or not device.startswith("cuda"):
        return device
    if device != "cuda":
        sentence = f"device {device!r} is one GPU for {os.environ['WORLD_SIZE']} processes."
        raise ConfigError(114, sentence, 'write device = "cuda": each process takes one of its own.')
    return f"cuda:{os.environ['LOCAL_RANK']}"


def is_helper() -> bool:
    """Return whether torchrun started this process as a helper."""
    return _is_distributed() and os.environ["RANK"] != "0"


def _is_distributed() -> bool:
    return distributed.is_torchelastic_launched() and os.environ["WORLD_SIZE"] != "1"


@contextmanager
def joined_group(device: str) -> Iterator[Group | None]:
    """Join torchrun's group for the block, None without one; StateError 509 when the other processes do not join."""
    if not _is_distributed():
        yield None
        return
    group = Group(device)
    try:
        yield group
    finally:
        group.leave()


class Group:
    """Group of the processes that torchrun started for one server; `device` is that of `device_of_rank`."""

    def __init__(self, device: str) -> None:
        self.rank, self.size, self.device = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), device
        if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
            _bind_to_loopback()
        with _peer_errors():
            if device.startswith("cuda"):
                torch.cuda.set_device(device)
            distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=STEP_TIMEOUT)
            # Commands use gloo: a GPU would spin for a night while it waits for one.
            self._commands: Any = distributed.new_group(backend="gloo", timeout=COMMAND_TIMEOUT)

    def send(self, command: int, body: bytes = b"") -> None:
        """Send a command to the helpers, which `receive` it; called by rank 0."""
        with _peer_errors():
            distributed.broadcast(torch.tensor([command, len(body)]), 0, group=self._commands)
            if body:
                distributed.broadcast(torch.frombuffer(bytearray(body), dtype=torch.uint8), 0, group=self._commands)

    def receive(self) -> tuple[int, bytes]:
        """Wait for the next command of rank 0, and return it with its body; called by a helper."""
        with _peer_errors():
            distributed.broadcast(header := torch.empty(2, dtype=torch.int64), 0, group=self._commands)
            command, length = header.tolist()
            if length:
                distributed.broadcast(body := torch.empty(length, dtype=torch.uint8), 0, group=self._commands)
        return command, body.numpy().tobytes() if length else b""

    def leave(self) -> None:
        """Leave the group; rank 0 also stops the helpers."""
        with suppress(StateError):  # a helper may be gone already
            if self.rank == 0:
                self.send(EXIT)
        distributed.destroy_process_group()


class DividedTop(StoredTop):
    """Top that divides its training steps among a group; ConfigError 114 if layers need a whole batch in a process."""

    def __init__(
        self, module: nn.Module, optimizer: OptimizerSection, task: TaskSection, store: ActivationStore, group: Group
    ) -> None:
        if any(isinstance(part, _BatchNorm) for part in module.modules()):
            if group.device == "cpu":
                sentence = "batch normalisation needs the whole batch, and on the CPU each process has a share of it."
                raise ConfigError(114, sentence, "use GroupNorm, or a single process.")
            module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
        super().__init__(module, optimizer, task, group.device, store)
        self._group = group
        self._parallel: DistributedDataParallel | None = None

    @override
    def train_stored(self, rows: Sequence[Row], seed: int, progress: Progress) -> float:
        # Called by rank 0.
        if self._parallel is None:
            self._group.send(STATE, save({name: tensor.contiguous() for name, tensor in self.state().items()}))
            self._parallel = self._wrap()
        self._group.send(STEP, json.dumps([rows, seed, progress]).encode())
        return self._step(rows, seed, progress)

    def help(self) -> None:
        """Execute the commands of rank 0 until it exits; called by a helper."""
        while True:
            command, body = self._group.receive()
            if command == EXIT:
                return
            if command == STATE:
                self.restore(load(body))
                self._parallel = self._wrap()
            else:
                rows, seed, progress = json.loads(body)
                with suppress(Refused):  # every rank refuses, and rank 0 counts it
                    self._step(rows, seed, Progress(*progress))

    def _wrap(self) -> DistributedDataParallel:
        # With find_unused_parameters the gradients keep their places in the buckets, and with them the order of
        # their sum, in the first step and all later ones: so a restart repeats it bit by bit.
        with _peer_errors():
            return DistributedDataParallel(self.module, find_unused_parameters=True)

    def _step(self, rows: Sequence[Row], seed: int, progress: Progress) -> float:
        share = Share.of(self._group, len(rows))
        smashed, targets = self.store.gather(rows[share.first : share.last])
        assert self._parallel is not None
        self.module.train()
        with _peer_errors(), buffers_kept(self.module):
            with seeded(seed, self._device), share:
                outputs = self._parallel(smashed.to(self._device))
                loss = loss_of(self._task, outputs, targets.to(self._device)) * share.weight
            distributed.all_reduce(total := loss.detach().clone())
            self.optimizer.zero_grad()
            torch.autograd.backward(loss * self._group.size)  # DDP takes the mean over ranks, and this is a sum
            check_step(self.module, total)  # equal at every rank, and so is its outcome
        self.optimizer.step(progress)
        return total.item()


class Share(TorchFunctionMode):
    """Rows [first, last) of one rank in a step, and its part of the dropout masks of the whole step.

    Every rank draws the masks of all rows, from the same seed, and takes its own: so dropout has the same
    result as in a single process. Other random functions draw only for the share.
    """

    def __init__(self, first: int, last: int, total: int, weight: float) -> None:
        super().__init__()
        self.first, self.last, self.total, self.weight = first, last, total, weight

    @classmethod
    def of(cls, group: Group, total: int) -> Share:
        """Return the share of this process in `total` rows, which are divided as evenly as possible."""
        first, last = total * group.rank // group.size, total * (group.rank + 1) // group.size
        if first == last:  # DDP waits for every rank: one without rows computes the first row with weight 0
            return cls(0, 1, total, 0.0)
        return cls(first, last, total, (last - first) / total)

    @override
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


def _bind_to_loopback() -> None:
    """Use only the loopback device, since the messages between ranks are neither encrypted nor signed."""
    for _, name in socket.if_nameindex():
        if name in ("lo", "lo0"):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


@contextmanager
def _peer_errors() -> Iterator[None]:
    """Turn the failure of a collective operation into StateError 509; gloo has no error class of its own."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, distributed.DistError) and "gloo" not in text:
            raise
        # A message of gloo is "[file:line] sentence. advice".
        sentence = f"{text.partition('] ')[2].partition('. ')[0] or text.splitlines()[0]}."
        fix = "start the same command again: it continues from the last checkpoint."
        raise StateError(509, sentence, fix) from None
