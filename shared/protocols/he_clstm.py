"""he_clstm (Yue et al., ACM TOIT 21(3):57, HE-CLSTM): sequences are judged while they are encrypted.

A system of the Query shape. It asks a model that is there: the one of a finished run whose last stage is a
`SequenceJudge`. Whether its gates see the state decides how a query goes:

    refresh    gates see h: one message each way for every frame. Between two frames h, c and the votes come
               back to the site, blinded, which encrypts them afresh: 3 levels are enough for any length.
    one_shot   gates see x_t alone: one message each way, made for a site that is offline until tomorrow.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.errors import ConfigError, Refused, RunError
from nightsplit.shared.he.ckks import Circuit
from nightsplit.shared.he.packing import Batch, Packing, Slots
from nightsplit.shared.he.weights import Judge
from nightsplit.shared.models.partition import make
from nightsplit.shared.models.sequences import SequenceJudge

MOST_FRAMES = 14
"""Of a one_shot query: five levels, of 29 bits each. Six would leave 25 bits, and errors that change decisions."""

REFRESH = Circuit(degree=8192, bits=(56, 32, 32, 32, 60), scale_bits=32)
"""Three levels a frame. 24 bits above the scale are room for the blinding. The last prime has to be clearly larger than
the first one: with 60 bits for both, rotations made errors of 8e-3 in logits, which now are below 2e-4."""

BLINDING = 2.0**22
"""Numbers that blind are below it, in absolute value; states are within about 1."""


def circuit_of(judge: Judge) -> Circuit:
    """The circuit for queries to a model: 128 bits of security, ring of degree 8192, of which 218 bits may be primes.

    Raises:
        ConfigError: 105 the model's sequences are too long.
    """
    if judge.state is not None:
        return REFRESH
    if judge.frames > MOST_FRAMES:
        raise ConfigError(
            105,
            f"a one_shot query may have {MOST_FRAMES} frames, the model takes {judge.frames}.",
            "train with recurrent = true, whose queries go to the server frame by frame.",
        )
    levels = one_shot_levels(judge.frames)
    scale = 204 // (levels + 2)
    return Circuit(8192, (scale + 7, *[scale] * levels, scale + 7), scale)


def one_shot_levels(frames: int) -> int:
    """What a one_shot query takes: a level for the gates, and the depth of the tree of products over time."""
    return 1 + (frames + 1).bit_length()


def steps_of(judge: Judge) -> int:
    """Messages of a query each way."""
    return 1 if judge.state is None else judge.frames


SEVERAL = 700
"""Sequences from which on a batch is faster than slots."""


def packing_of(name: str, circuit: Circuit, judge: Judge) -> Packing:
    """The packing that a query names.

    Raises:
        Refused: 304 there is none of that name for this model.
    """
    if name == "batch":
        return Batch(circuit.slots)
    if name == "slots" and judge.state is not None:
        return Slots(circuit.slots, judge.features, judge.hidden)
    raise Refused(304, f"packing {name!r} is unknown here.", "run the same version at both sides.")


def rotations_of(circuit: Circuit, judge: Judge) -> tuple[int, ...]:
    """Steps by which a server rotates what a site encrypts, whatever the packing."""
    return () if judge.state is None else packing_of("slots", circuit, judge).rotations


def packing_for(sequences: int, judge: Judge) -> str:
    """The packing that suits so many sequences."""
    return "slots" if judge.state is not None and sequences < SEVERAL else "batch"


def stages_of(config: RunConfig) -> tuple[nn.Sequential, nn.Sequential]:
    """Both parts of a run's model, as it is made: what works at the site, and the judge alone.

    Raises:
        ConfigError: 104 the model cannot be made, 105 its last stage cannot work on ciphertexts.
    """
    whole = make(config.model, config.run.seed)
    stages = list(whole.named_children()) if isinstance(whole, nn.Sequential) else []
    if len(stages) < 2 or not isinstance(stages[-1][1], SequenceJudge):
        raise ConfigError(
            105,
            f"model.factory {config.model.factory}: its last stage works on no ciphertexts.",
            "train a model that ends with a SequenceJudge, as nightsplit.models:clstm does.",
        )
    return nn.Sequential(OrderedDict(stages[:-1])), nn.Sequential(OrderedDict(stages[-1:]))


def judge_of(last: nn.Sequential) -> Judge:
    """The judge in its part, with the weights that it has there."""
    (judge,) = last.children()
    return Judge.of(judge.state_dict())


def fill(part: nn.Module, folder: Path, names: Sequence[str]) -> None:
    """Load the trained weights of a part.

    Args:
        part: of the run's model.
        folder: where the finished run has written its model.
        names: of files that hold the part's weights, perhaps among others; the first that is there is read.

    Raises:
        RunError: 605 there is none, 604 the weights are not in it, or are others.
    """
    path = next((folder / name for name in names if (folder / name).exists()), None)
    if path is None:
        raise RunError(
            605, f"{folder} has no trained model: the run has not finished here.", "let the run finish first."
        )
    try:
        with safe_open(path, framework="pt") as file:
            part.load_state_dict({name: file.get_tensor(name) for name in part.state_dict()})
    except (OSError, SafetensorError, RuntimeError) as error:
        raise RunError(
            604, f"{path}: {str(error).splitlines()[0]}.", "name the file that the finished run has written."
        ) from None
