"""Parameters, steps and packing of a query to a `SequenceClassifier`, the same at site and server."""

from nightsplit.shared.errors import ConfigError, mismatch
from nightsplit.shared.he.ckks import CkksParameters
from nightsplit.shared.he.packing import Batch, Packing, Slots
from nightsplit.shared.he.weights import ClassifierWeights

FRAMES_MAX = 14
"""Frames of a one_shot query: five levels of 29 bits. Six would leave 25 bits, and errors that change decisions."""

REFRESH = CkksParameters(degree=8192, bits=(56, 32, 32, 32, 60), scale_bits=32)
"""Parameters of three levels a frame. The blinding takes the 24 bits above the scale. The last prime has to be clearly
larger than the first: with 60 bits for both, rotations caused errors of 8e-3 in logits, which now are below 2e-4."""

BLINDING = 2.0**22
"""Bound of the blinding numbers' absolute values; states are within about 1."""


def parameters_for(classifier: ClassifierWeights) -> CkksParameters:
    """Return the parameters for queries to a model: 128 bits of security, degree 8192, 218 bits for primes.

    Raises:
        ConfigError: 105 the model's sequences are too long.
    """
    if classifier.state is not None:
        return REFRESH
    if classifier.frames > FRAMES_MAX:
        sentence = f"a one_shot query may have {FRAMES_MAX} frames, the model takes {classifier.frames}."
        raise ConfigError(105, sentence, "train with recurrent = true, whose queries go to the server frame by frame.")
    levels = one_shot_levels(classifier.frames)
    scale = (218 - 2 * 7) // (levels + 2)  # in bits; the first and the last prime have 7 more
    return CkksParameters(8192, (scale + 7, *[scale] * levels, scale + 7), scale)


def one_shot_levels(frames: int) -> int:
    """Return the levels of a one_shot query: one for the gates, and the depth of the tree of products over time."""
    return 1 + (frames + 1).bit_length()


def steps_of(classifier: ClassifierWeights) -> int:
    """Return the number of messages of a query in each direction."""
    return 1 if classifier.state is None else classifier.frames


BATCH_SEQUENCES_MIN = 700
"""Number of sequences from which `Batch` is faster than `Slots`."""


def packing_of(name: str, ckks: CkksParameters, classifier: ClassifierWeights) -> Packing:
    """Return the packing of this name; Refused 304 if this model has none of that name."""
    if name == "batch":
        return Batch(ckks.slots)
    if name == "slots" and classifier.state is not None:
        return Slots(ckks.slots, classifier.features, classifier.hidden)
    raise mismatch(f"packing {name!r} is unknown here.")


def rotations_of(ckks: CkksParameters, classifier: ClassifierWeights) -> tuple[int, ...]:
    """Return the steps by which a server rotates a site's ciphertexts, in any packing."""
    return () if classifier.state is None else packing_of("slots", ckks, classifier).rotations


def fastest_packing(sequences: int, classifier: ClassifierWeights) -> str:
    """Return the name of the fastest packing for this number of sequences."""
    return "slots" if classifier.state is not None and sequences < BATCH_SEQUENCES_MIN else "batch"
