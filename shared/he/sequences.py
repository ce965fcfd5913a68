"""CkksParameters, steps and packing of a query to a `SequenceClassifier`, on which site and server agree."""

from nightsplit.shared.errors import ConfigError, mismatch
from nightsplit.shared.he.ckks import CkksParameters
from nightsplit.shared.he.packing import Batch, Packing, Slots
from nightsplit.shared.he.weights import ClassifierWeights

MOST_FRAMES = 14
"""Of a one_shot query: five levels, of 29 bits each. Six would leave 25 bits, and errors that change decisions."""

REFRESH = CkksParameters(degree=8192, bits=(56, 32, 32, 32, 60), scale_bits=32)
"""Three levels a frame. 24 bits above the scale are room for the blinding. The last prime has to be clearly larger than
the first one: with 60 bits for both, rotations made errors of 8e-3 in logits, which now are below 2e-4."""

BLINDING = 2.0**22
"""FloatArray that blind are below it, in absolute value; states are within about 1."""


def parameters_for(classifier: ClassifierWeights) -> CkksParameters:
    """CKKS parameters for queries to a model: 128 bits of security, ring of degree 8192, with 218 bits for primes.

    Raises:
        ConfigError: 105 the model's sequences are too long.
    """
    if classifier.state is not None:
        return REFRESH
    if classifier.frames > MOST_FRAMES:
        what = f"a one_shot query may have {MOST_FRAMES} frames, the model takes {classifier.frames}."
        raise ConfigError(105, what, "train with recurrent = true, whose queries go to the server frame by frame.")
    levels = one_shot_levels(classifier.frames)
    scale = 204 // (levels + 2)
    return CkksParameters(8192, (scale + 7, *[scale] * levels, scale + 7), scale)


def one_shot_levels(frames: int) -> int:
    """What a one_shot query takes: a level for the gates, and the depth of the tree of products over time."""
    return 1 + (frames + 1).bit_length()


def steps_of(classifier: ClassifierWeights) -> int:
    """Messages of a query each way."""
    return 1 if classifier.state is None else classifier.frames


SEVERAL = 700
"""Sequences from which on a batch is faster than slots."""


def packing_of(name: str, ckks: CkksParameters, classifier: ClassifierWeights) -> Packing:
    """The packing that a query names; Refused 304 where there is none of that name for this model."""
    if name == "batch":
        return Batch(ckks.slots)
    if name == "slots" and classifier.state is not None:
        return Slots(ckks.slots, classifier.features, classifier.hidden)
    raise mismatch(f"packing {name!r} is unknown here.")


def rotations_of(ckks: CkksParameters, classifier: ClassifierWeights) -> tuple[int, ...]:
    """Steps by which a server rotates what a site encrypts, whatever the packing."""
    return () if classifier.state is None else packing_of("slots", ckks, classifier).rotations


def packing_for(sequences: int, classifier: ClassifierWeights) -> str:
    """The packing that suits so many sequences."""
    return "slots" if classifier.state is not None and sequences < SEVERAL else "batch"
