"""Metrics of a running training: JSON lines for machines, TensorBoard event files for people."""

import json
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
        written = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        whole = [line for line in written if line.endswith("\n")]  # a crash may have cut off the last one
        kept = [line for line in whole if json.loads(line)["step"] <= resumed_step]
        self._repeatable = {line for line in kept if json.loads(line)["step"] == resumed_step}
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

    def close(self) -> None:
        """Close both files."""
        self._file.close()
        self._board.close()
