"""he_clstm (Yue et al., ACM TOIT 21(3):57, HE-CLSTM), the server's half: it judges sequences that it cannot read."""

import hashlib
from collections.abc import Sequence

import numpy as np

from nightsplit.server_worker.he import batch, one_shot, slots
from nightsplit.server_worker.he.arithmetic import Arithmetic
from nightsplit.server_worker.he.batch import State
from nightsplit.shared.errors import mismatch
from nightsplit.shared.he.ckks import Ciphertext, PublicKeys, to_bytes
from nightsplit.shared.he.packing import Packing
from nightsplit.shared.he.sequences import BLINDING, packing_of, parameters_for, steps_of
from nightsplit.shared.he.weights import ClassifierWeights, FloatArray


class HeClstmServer:
    """Answers one query after the other, and remembers none.

    h, c and votes go back to the site between two frames, which encrypts them afresh. Before, a number is added to
    every slot, uniform within `BLINDING` and derived from the server's secret and a nonce: the site sees states that
    are hidden but for a part in about 2^22. It sends the nonce back with them, so any server with the secret can take
    the numbers away again. Each answer has a nonce of its own: a site that asks twice cannot subtract the answers.

    Args:
        classifier: with its trained weights.
        secret: of the servers of this run, 32 bytes.

    Raises:
        ConfigError: 105 as `parameters_for`.
    """

    def __init__(self, classifier: ClassifierWeights, secret: bytes) -> None:
        self._classifier = classifier
        self._secret = secret
        self.ckks = parameters_for(classifier)
        self.steps = steps_of(classifier)

    def answer(
        self, keys: PublicKeys, step: int, packing_name: str, pieces: Sequence[bytes], before: str, after: str
    ) -> list[bytes]:
        """Evaluate a step of a query.

        Args:
            keys: of the site.
            step: from 0.
            packing_name: as `packing_of` takes it.
            pieces: ciphertexts: the features of the frame (one_shot: of all frames); from the second frame on
                also h, c and votes as the last answer had them.
            before: nonce of that answer; empty at the first step.
            after: a new nonce.

        Returns:
            Ciphertexts: h, c and votes, blinded; at the last step the logits.

        Raises:
            Refused: 304 there is no such step or packing, 313 ciphertexts or keys cannot be used.
        """
        packing = packing_of(packing_name, self.ckks, self._classifier)
        arithmetic = Arithmetic(self.ckks, keys, packing.rotations)
        if not 0 <= step < self.steps:
            raise mismatch(f"there is no step {step} of {self.steps}.")
        if self._classifier.state is None:
            features = self._read(pieces, [len(packing.frame(self._nothing))] * self._classifier.frames)
            return [to_bytes(one_shot.logits(arithmetic, self._classifier, features))]
        method = batch if packing_name == "batch" else slots
        frame, state = self._taken(arithmetic, packing, step, pieces, before)
        if step == self.steps - 1:
            logits = method.last_step(arithmetic, self._classifier, frame, state)
            (numbers,) = self._blinding(after, 1)  # other slots than those of the logits tell of the weights
            shown = packing.votes(numbers[: packing.capacity])
            return [to_bytes(arithmetic.plus(logits, (numbers - shown).tolist()))]
        state = method.step(arithmetic, self._classifier, step, frame, state)
        every = [arithmetic.bottom(part) for part in (*state.h, *state.c, state.votes)]
        blinding = self._blinding(after, len(every))
        return [
            to_bytes(arithmetic.plus(part, numbers.tolist())) for part, numbers in zip(every, blinding, strict=True)
        ]

    @property
    def _nothing(self) -> FloatArray:
        return np.zeros((0, self._classifier.features))

    def _taken(
        self, arithmetic: Arithmetic, packing: Packing, step: int, pieces: Sequence[bytes], nonce: str
    ) -> tuple[list[Ciphertext], State | None]:
        """The features of a frame, and what came of the frame before with the blinding taken away."""
        top, hidden = self.ckks.top, len(packing.state(np.zeros((0, self._classifier.hidden))))
        features = len(packing.frame(self._nothing))
        if step == 0:
            return self._read(pieces, [features])[0], None
        numbers = self._blinding(nonce, 2 * hidden + 1)
        frame, h, c, (votes,) = self._read(pieces, [features, hidden, hidden, 1], [top, top, top - 1, top - 1])
        everybody = packing.capacity
        for row, blinded in ((h, numbers[:hidden]), (c, numbers[hidden:-1])):
            for part, vector in zip(row, packing.state(packing.read_state(blinded, everybody)), strict=True):
                arithmetic.minus(part, vector.tolist())
        arithmetic.minus(votes, packing.votes(packing.read_votes(numbers[-1], everybody)).tolist())
        return frame, State(h, c, votes)

    def _read(
        self, pieces: Sequence[bytes], lengths: Sequence[int], levels: Sequence[int] | None = None
    ) -> list[list[Ciphertext]]:
        """Ciphertexts in rows of these lengths and levels; without levels, all of the highest one."""
        if len(pieces) != sum(lengths):
            raise mismatch(f"{len(pieces)} ciphertexts came, not {sum(lengths)}.")
        rest = iter(pieces)
        return [
            [self.ckks.read(next(rest), level) for _ in range(length)]
            for length, level in zip(lengths, levels or [self.ckks.top] * len(lengths), strict=True)
        ]

    def _blinding(self, nonce: str, count: int) -> list[FloatArray]:
        """FloatArray for so many ciphertexts, a number for each slot."""
        seed = self._secret + nonce.encode()
        drawn = np.frombuffer(hashlib.shake_256(seed).digest(8 * count * self.ckks.slots), dtype="<u8")
        return list((drawn * (2 * BLINDING / 2.0**64) - BLINDING).reshape(count, self.ckks.slots))


ROLE = HeClstmServer
