"""Server's side of he_clstm (Yue et al., ACM TOIT 21(3):57, HE-CLSTM): classifies sequences that it cannot read."""

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
    """Server of encrypted queries, which keeps no state between them.

    After every frame but the last, the LSTM's state (h, c) and the logits so far (votes) go back to the site, which
    decrypts them, encrypts them afresh and returns them with the next frame. The server blinds them first: it adds to
    every slot a number drawn uniformly from [-`BLINDING`, `BLINDING`], derived from its secret and a nonce. A blinded
    number reveals its state with a probability of about 2^-22. The site returns the nonce as well, so that any server
    with the secret can remove the blinding. Every answer has a nonce of its own: the difference of two answers with
    one nonce would cancel the blinding.
    """

    def __init__(self, classifier: ClassifierWeights, secret: bytes) -> None:
        self._classifier = classifier
        self._secret = secret
        self.ckks = parameters_for(classifier)
        self.steps = steps_of(classifier)

    def answer(
        self, keys: PublicKeys, step: int, packing_name: str, pieces: Sequence[bytes], previous_nonce: str, nonce: str
    ) -> list[bytes]:
        """Evaluate a step of a query.

        Args:
            step: number of the step, from 0.
            packing_name: name of the packing, for `packing_of`.
            pieces: ciphertexts: the features of the frame (one_shot: of all frames); from the second frame on
                also h, c and votes of the previous answer.
            previous_nonce: nonce of that answer; empty at the first step.
            nonce: a new nonce, for this answer.

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
            features = self._read(pieces, [self._widths(packing)[0]] * self._classifier.frames)
            return [to_bytes(one_shot.logits(arithmetic, self._classifier, features))]
        method = batch if packing_name == "batch" else slots
        frame, state = self._read_frame(arithmetic, packing, step, pieces, previous_nonce)
        if step == self.steps - 1:
            logits = method.last_step(arithmetic, self._classifier, frame, state)
            # The site may read the logits alone: the sums in the other slots depend on the weights.
            (blinding,) = self._blinding(nonce, 1)
            at_logits = packing.votes(blinding[: packing.capacity])
            return [to_bytes(arithmetic.add_plain(logits, (blinding - at_logits).tolist()))]
        state = method.step(arithmetic, self._classifier, step, frame, state)
        parts = [arithmetic.drop_levels(part) for part in (*state.h, *state.c, state.votes)]
        pairs = zip(parts, self._blinding(nonce, len(parts)), strict=True)
        return [to_bytes(arithmetic.add_plain(part, numbers.tolist())) for part, numbers in pairs]

    def _widths(self, packing: Packing) -> tuple[int, int]:
        """Return the numbers of ciphertexts that hold the features of a frame, and h or c."""
        frame, state = np.zeros((0, self._classifier.features)), np.zeros((0, self._classifier.hidden))
        return len(packing.frame(frame)), len(packing.state(state))

    def _read_frame(
        self, arithmetic: Arithmetic, packing: Packing, step: int, pieces: Sequence[bytes], nonce: str
    ) -> tuple[list[Ciphertext], State | None]:
        """Return the features of a frame, and the state after the previous one, unblinded; None at the first frame."""
        top, (features, hidden) = self.ckks.top, self._widths(packing)
        if step == 0:
            return self._read(pieces, [features])[0], None
        # Levels as in `State`: h is at the highest, c and votes are one below.
        frame, h, c, (votes,) = self._read(pieces, [features, hidden, hidden, 1], [top, top, top - 1, top - 1])
        *blinding, at_votes = self._blinding(nonce, 2 * hidden + 1)
        # The site has unpacked and packed the blinded state: the blinding lies in the slots as if it had been, too.
        for row, numbers in ((h, blinding[:hidden]), (c, blinding[hidden:])):
            repacked = packing.state(packing.read_state(numbers, packing.capacity))
            for ciphertext, vector in zip(row, repacked, strict=True):
                arithmetic.subtract_plain(ciphertext, vector.tolist())
        repacked_votes = packing.votes(packing.read_votes(at_votes, packing.capacity))
        arithmetic.subtract_plain(votes, repacked_votes.tolist())
        return frame, State(h, c, votes)

    def _read(
        self, pieces: Sequence[bytes], lengths: Sequence[int], levels: Sequence[int] | None = None
    ) -> list[list[Ciphertext]]:
        """Return ciphertexts in rows of these lengths and levels, by default the highest one."""
        if len(pieces) != sum(lengths):
            raise mismatch(f"{len(pieces)} ciphertexts arrived instead of {sum(lengths)}.")
        rest = iter(pieces)
        return [
            [self.ckks.read(next(rest), level) for _ in range(length)]
            for length, level in zip(lengths, levels or [self.ckks.top] * len(lengths), strict=True)
        ]

    def _blinding(self, nonce: str, count: int) -> list[FloatArray]:
        """Return numbers for `count` ciphertexts, one for each slot."""
        seed = self._secret + nonce.encode()
        random = np.frombuffer(hashlib.shake_256(seed).digest(8 * count * self.ckks.slots), dtype="<u8")
        return list((random * (2 * BLINDING / 2.0**64) - BLINDING).reshape(count, self.ckks.slots))


ROLE = HeClstmServer
