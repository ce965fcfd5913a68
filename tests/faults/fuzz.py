"""Mutants of every kind of message through the reader, as the engine reads them.

    python -m tests.faults.fuzz [--messages N] [--seed S] [--json FILE] [--quick]
    python -m tests.faults.fuzz --replay FILE

Whatever the bytes are, reading ends in a message or in `Refused`; anything else is a crash. What is
accepted must honour its contract and, where its codecs lose nothing, encode to the same bytes again.
A hang is a message that takes more than 50 ms of its thread's CPU time to read: the machine may be
shared. Memory is the peak of the process over the whole campaign above what it had at its start. A
mutant that fails is written to fuzz-SEED-NUMBER.json in the current folder, for --replay.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.speed.common import MiB, resident_bytes
from nightsplit.shared.errors import Refused
from nightsplit.shared.runtime.process import prepare_torch
from nightsplit.shared.wire import format as wire
from nightsplit.shared.wire import head
from nightsplit.shared.wire.message import Kind, Message
from nightsplit.shared.wire.schema import Payload
from tests.faults.mutants import mutant
from tests.faults.specimens import LIMIT, Specimen, specimens

HANG_MS = 50.0
GROWTH_MB = 64.0
QUICK = 5_000
LOSSLESS = ("raw", "fp32", "bf16")
KEPT = 20
"""Failures that are written to files."""


def read(contract: Mapping[Kind, Payload], body: bytes) -> Message:
    """Read a body as the engine does: the header, the payload of its kind, the rest.

    Raises:
        Refused: and nothing else.
    """
    kind = head.read_head(body).header.kind
    if kind not in contract:
        raise Refused(303, f"{kind} is not used here.", "check that both sides run the same protocol.")
    return wire.decode(body, contract[kind], LIMIT)


class InvalidError(Exception):
    """A message was accepted that its contract does not allow."""


def check(message: Message, payload: Payload, body: bytes) -> bool:
    """Whether an accepted message encodes to its own bytes again.

    Bytes may differ only where a codec or zstd has more than one spelling of a value.

    Raises:
        InvalidError: the message is not what its contract says.
    """
    for name, spec in payload.tensors.items():
        tensor = message.tensors[name]
        fits = all(isinstance(want, str) or want == have for want, have in zip(spec.shape, tensor.shape, strict=True))
        if tensor.dtype != spec.dtype or not fits or not torch.isfinite(tensor).all():
            raise InvalidError(f"{name}: {tensor.dtype}, {tuple(tensor.shape)}")
    types = {name: spec.type for name, spec in payload.scalars.items()}
    if {name: type(value) for name, value in message.scalars.items()} != types:
        raise InvalidError(f"scalars: {message.scalars}")
    again = b"".join(wire.encode(message, payload, LIMIT))
    if again == body:
        return True
    if all(spec.codec in LOSSLESS and not spec.zstd for spec in payload.tensors.values()):
        raise InvalidError("encodes to other bytes")
    copy = wire.decode(again, payload, LIMIT)
    if (copy.header, copy.scalars) != (message.header, message.scalars):
        raise InvalidError("encodes to another header")
    for name, tensor in message.tensors.items():
        lossless = payload.tensors[name].codec in LOSSLESS
        tolerance = 0.0 if lossless else tensor.abs().max().item() * 0.004 + 1e-38
        if not torch.allclose(copy.tensors[name], tensor, rtol=0.0, atol=tolerance):
            raise InvalidError(f"{name}: encodes to other values")
    return False


@dataclass
class Campaign:
    """What became of the mutants so far.

    Attributes:
        crashes: reading raised something else than `Refused`, or accepted what is not valid.
        hangs: reading took more than 50 ms of CPU time.
        resent_equal: accepted, and encoding gave the same bytes.
        refused: how often, by number.
        failures: number of each mutant that crashed or hung, and why.
    """

    good: list[Specimen]
    seed: int
    messages: int = 0
    crashes: int = 0
    hangs: int = 0
    slowest_ms: float = 0.0
    accepted: int = 0
    resent_equal: int = 0
    refused: Counter[int] = field(default_factory=Counter)
    failures: dict[int, str] = field(default_factory=dict)

    def run(self, numbers: range) -> None:
        """Read these mutants."""
        for number in numbers:
            specimen, _, body = mutant(self.good, self.seed, number)
            if (why := self.read(specimen.contract, body)) is not None:
                self.failures[number] = why

    def read(self, contract: Mapping[Kind, Payload], body: bytes) -> str | None:
        """Read one body and count what became of it; why it failed, if it did."""
        self.messages += 1
        why: str | None = None
        began = time.thread_time_ns()
        try:
            message: Message | None = read(contract, body)
        except Refused as refusal:
            message = None
            self.refused[refusal.number] += 1
        except BaseException:
            message, why = None, traceback.format_exc()
        spent = (time.thread_time_ns() - began) / 1e6
        self.slowest_ms = max(self.slowest_ms, spent)
        if message is not None:
            self.accepted += 1
            try:
                self.resent_equal += check(message, contract[message.header.kind], body)
            except Exception:
                why = traceback.format_exc()
        self.crashes += why is not None
        if spent > HANG_MS:
            self.hangs += 1
            why = why or f"took {spent:.0f} ms"
        return why

    def figures(self) -> dict[str, float]:
        """Counts and times, flat."""
        return {
            "messages": self.messages, "crashes": self.crashes, "hangs": self.hangs,
            "slowest_ms": round(self.slowest_ms, 2), "accepted": self.accepted, "resent_equal": self.resent_equal,
            **{f"refused_{number}": count for number, count in sorted(self.refused.items())},
        }  # fmt: skip


def save(campaign: Campaign, folder: Path) -> None:
    """Write failed mutants to files that `replay` reads."""
    for number, why in list(campaign.failures.items())[:KEPT]:
        specimen, mutation, body = mutant(campaign.good, campaign.seed, number)
        content = {"specimen": specimen.name, "mutation": mutation, "body": body.hex(), "why": why}
        (folder / f"fuzz-{campaign.seed}-{number}.json").write_text(json.dumps(content, indent=1) + "\n")


def replay(path: Path) -> str | None:
    """Read the mutant in a file again; why it fails, if it still does."""
    content = json.loads(path.read_text())
    specimen = next(one for one in specimens() if one.name == content["specimen"])
    return Campaign([], 0).read(specimen.contract, bytes.fromhex(content["body"]))


class Growth:
    """How far the process's peak of resident memory rises above what it had when this object was made."""

    def __init__(self) -> None:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        self._before = resident_bytes()

    def mebibytes(self) -> float:
        """Since this object was made."""
        status = Path("/proc/self/status").read_text()
        peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
        return max(0.0, peak * 1024 - self._before) / MiB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=100_000, metavar="N", help="mutants (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of the campaign (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} mutants: shows that it works")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="read one failed mutant again")
    options = parser.parse_args()
    prepare_torch(1, "cpu")
    if options.replay is not None:
        sys.exit(replay(options.replay))  # the reason, or nothing
    campaign = Campaign(specimens(), options.seed)
    gc.collect()
    gc.freeze()  # so that no message is charged for a walk through all modules
    growth, began = Growth(), time.monotonic()
    campaign.run(range(QUICK if options.quick else options.messages))
    seconds = time.monotonic() - began
    figures = {**campaign.figures(), "rss_growth_mb": round(growth.mebibytes(), 1), "seconds": round(seconds, 1)}
    print(json.dumps(figures, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    save(campaign, Path.cwd())
    sys.exit(bool(campaign.failures or figures["rss_growth_mb"] >= GROWTH_MB))


if __name__ == "__main__":
    main()
