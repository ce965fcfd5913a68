"""Metrics of a running training: JSON lines for machines, TensorBoard event files for people."""

import json
import math
import os
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from nightsplit.shared.engine.effects import Record
from nightsplit.shared.storage.files import write_atomic


class MetricsLog:
    """Log to `metrics.jsonl` and `tensorboard/` in a report folder, which is created when missing.

    `resumed_step` is the training step of the restored checkpoint. Later lines will be written again, so they are
    removed here. An evaluation makes no step: one that was written after the checkpoint has the same number, comes
    again as well, and is skipped then.
    """

    def __init__(self, folder: Path, resumed_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        written = path.read_text("utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []
        kept = [line for line in written if _step_of(line) <= resumed_step]
        self._repeatable = {line for line in kept if _step_of(line) == resumed_step}
        write_atomic(path, "".join(kept).encode())
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, record: Record) -> None:
        """Append a line; its metrics must include `step`."""
        metrics = dict(record.metrics)
        line = json.dumps(metrics, sort_keys=True) + "\n"
        if line in self._repeatable:
            return
        self._file.write(line)
        self._file.flush()
        step = int(metrics.pop("step") or 0)
        path = "/".join(str(metrics.pop(name)) for name in ("event", "part", "site") if name in metrics)
        for name, value in metrics.items():
            if isinstance(value, float):
                self._board.add_scalar(f"{path}/{name}", value, step)

    def sync(self) -> None:
        """Force the lines to disk; called before a checkpoint that contains their steps."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close both files."""
        self._file.close()
        self._board.close()


def _step_of(line: str) -> float:
    """Return a line's step; infinity if a crash cut it off, or a power cut damaged it: it is in no checkpoint then."""
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except ValueError:
        return math.inf
