"""he_clstm (Yue et al., ACM TOIT 21(3):57, HE-CLSTM): the site sends encrypted sequences and decrypts their scores."""

from collections.abc import Sequence

import numpy as np
from typing_extensions import override

from nightsplit.shared.errors import mismatch
from nightsplit.shared.he.packing import Packing
from nightsplit.shared.he.sequences import fastest_packing, packing_of, parameters_for, steps_of
from nightsplit.shared.he.weights import ClassifierWeights, FloatArray
from nightsplit.site_worker.query.keys import SecretKeys
from nightsplit.site_worker.query.role import QueryRole
from nightsplit.site_worker.query.store import Query


class HeClstmSite(QueryRole):
    """Role that encrypts the inputs of a step and decrypts its result; needs no trained weights."""

    def __init__(self, classifier: ClassifierWeights, keys: SecretKeys) -> None:
        self._classifier = classifier
        self._keys = keys
        self.ckks = parameters_for(classifier)
        self.steps = steps_of(classifier)

    @override
    def packing_for(self, sequences: int) -> tuple[str, int]:
        name = fastest_packing(sequences, self._classifier)
        return name, packing_of(name, self.ckks, self._classifier).capacity

    @override
    def encrypt_step(self, query: Query) -> list[bytes]:
        packing, top = self._packing(query), self.ckks.top
        frames = query.features if self._classifier.state is None else query.features[:, query.step : query.step + 1]
        vectors = [vector for frame in frames.swapaxes(0, 1) for vector in packing.frame(frame)]
        pieces = [self._keys.encrypt(vector, top) for vector in vectors]
        if query.state is None:
            return pieces
        h, c, votes = np.split(query.state, [self._classifier.hidden, 2 * self._classifier.hidden], 1)
        pieces += [self._keys.encrypt(vector, top) for vector in packing.state(h)]
        pieces += [self._keys.encrypt(vector, top - 1) for vector in packing.state(c)]
        return [*pieces, self._keys.encrypt(packing.votes(votes[:, 0]), top - 1)]

    @override
    def decrypt_state(self, query: Query, pieces: Sequence[bytes]) -> FloatArray:
        packing, vectors = self._packing(query), self._decrypt(pieces)
        width = len(packing.state(np.zeros((0, self._classifier.hidden))))  # ciphertexts of h, and of c
        if len(vectors) != 2 * width + 1:
            raise mismatch(f"an answer has {len(pieces)} ciphertexts.")
        h, c = (packing.read_state(part, packing.capacity) for part in (vectors[:width], vectors[width:-1]))
        return np.concatenate([h, c, packing.read_votes(vectors[-1], packing.capacity)[:, None]], axis=1)

    @override
    def decrypt_logits(self, query: Query, pieces: Sequence[bytes]) -> FloatArray:
        vectors = self._decrypt(pieces)
        if len(vectors) != 1:
            raise mismatch(f"an answer has {len(pieces)} ciphertexts.")
        return vectors[0][: len(query.features)]

    def _decrypt(self, pieces: Sequence[bytes]) -> list[FloatArray]:
        return [self._keys.decrypt(self.ckks.read_any(piece)) for piece in pieces]

    def _packing(self, query: Query) -> Packing:
        return packing_of(query.packing, self.ckks, self._classifier)


ROLE = HeClstmSite
