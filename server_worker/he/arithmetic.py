"""Arithmetic on ciphertexts at the levels and scales of the run's parameters."""

from collections.abc import Iterable, Sequence

import numpy as np
import tenseal.sealapi as seal
from numpy.typing import ArrayLike

from nightsplit.shared.he.ckks import Ciphertext, CkksParameters, Plaintext, PublicKeys


class Arithmetic:
    """Arithmetic on the ciphertexts of one site. Methods return a new ciphertext unless they say that they change one.

    `rotations` are the steps that will be used, those of the packing; Refused 313 if the site's keys belong to other
    parameters, or lack one.
    """

    def __init__(self, ckks: CkksParameters, keys: PublicKeys, rotations: Sequence[int] = ()) -> None:
        self.ckks = ckks
        self._evaluator = seal.Evaluator(ckks.context)
        self._relin = ckks.read_relin(keys.relin)
        self._galois = ckks.read_galois(keys.galois, rotations) if rotations else None

    def weighted_sum(self, weights: ArrayLike, inputs: Sequence[Ciphertext], bias: float = 0.0) -> Ciphertext:
        """Return sum_j weights_j inputs_j + bias in every slot, one level below the inputs, which have one level."""
        level = self.ckks.level_of(inputs[0])
        plains = (self.ckks.encode(weight, level) for weight in np.asarray(weights).tolist())
        return self.add_plain(self.rescale(self.dot_plain(zip(inputs, plains, strict=True))), bias)

    def dot_plain(self, terms: Iterable[tuple[Ciphertext, Plaintext]]) -> Ciphertext:
        """Return the sum of ciphertexts times plaintexts of their level, slot by slot, before `rescale`."""
        total = None
        for ciphertext, plain in terms:
            if plain.is_zero():
                continue  # SEAL refuses a transparent product
            term = seal.Ciphertext()
            self._evaluator.multiply_plain(ciphertext, plain, term)
            if total is None:
                total = term
            else:
                self._evaluator.add_inplace(total, term)
        if total is None:  # only zeros: in place of the last one SEAL accepts the smallest number that can be encoded
            least = self.ckks.encode(1.0 / plain.scale, self.ckks.level_of(ciphertext), plain.scale)
            total = seal.Ciphertext()
            self._evaluator.multiply_plain(ciphertext, least, total)
        return total

    def add_plain(self, ciphertext: Ciphertext, numbers: float | Sequence[float]) -> Ciphertext:
        """Add numbers to `ciphertext`, which is changed and returned."""
        if not isinstance(numbers, float) or numbers:
            level = self.ckks.level_of(ciphertext)
            self._evaluator.add_plain_inplace(ciphertext, self.ckks.encode(numbers, level, ciphertext.scale))
        return ciphertext

    def subtract_plain(self, ciphertext: Ciphertext, numbers: Sequence[float]) -> Ciphertext:
        """Subtract numbers from `ciphertext`, which is changed and returned."""
        level = self.ckks.level_of(ciphertext)
        self._evaluator.sub_plain_inplace(ciphertext, self.ckks.encode(numbers, level, ciphertext.scale))
        return ciphertext

    def dot(self, pairs: Sequence[tuple[Ciphertext, Ciphertext]]) -> Ciphertext:
        """Return the sum of the products of pairs, one level below the lowest of all, with one relinearization."""
        level = min(self.ckks.level_of(one) for pair in pairs for one in pair)
        total = None
        for one, other in pairs:
            term = seal.Ciphertext()
            if one is other:
                self._evaluator.square(self.lower(one, level), term)
            else:
                self._evaluator.multiply(self.lower(one, level), self.lower(other, level), term)
            if total is None:
                total = term
            else:
                self._evaluator.add_inplace(total, term)
        self._evaluator.relinearize_inplace(total, self._relin)
        return self.rescale(total)

    def sum(self, terms: Sequence[Ciphertext]) -> Ciphertext:
        """Return the sum of ciphertexts, at the lowest of their levels."""
        level = min(map(self.ckks.level_of, terms))
        total = seal.Ciphertext()
        self._evaluator.add_many([self.lower(term, level) for term in terms], total)
        return total

    def subtract(self, one: Ciphertext, other: Ciphertext) -> Ciphertext:
        """Return the difference of two ciphertexts of one level."""
        difference = seal.Ciphertext()
        self._evaluator.sub(one, other, difference)
        return difference

    def lower(self, ciphertext: Ciphertext, level: int) -> Ciphertext:
        """Return the same numbers at a lower level, with its scale; `ciphertext` itself if it is at that level."""
        if self.ckks.level_of(ciphertext) == level:
            return ciphertext
        above, product = seal.Ciphertext(), seal.Ciphertext()
        self._evaluator.mod_switch_to(ciphertext, self.ckks.ids[level + 1], above)
        scale = self.ckks.scales[level] * self.ckks.primes[level + 1] / above.scale
        self._evaluator.multiply_plain(above, self.ckks.encode(1.0, level + 1, scale), product)
        return self.rescale(product)

    def drop_levels(self, ciphertext: Ciphertext) -> Ciphertext:
        """Return the same numbers at level 0 with their scale, where only decryption is possible."""
        lowest = seal.Ciphertext()
        self._evaluator.mod_switch_to(ciphertext, self.ckks.ids[0], lowest)
        return lowest

    def rotate(self, ciphertext: Ciphertext, steps: int) -> Ciphertext:
        """Return a rotated ciphertext: its slot k is slot k + steps. Needs the site's key for this step."""
        rotated = seal.Ciphertext()
        self._evaluator.rotate_vector(ciphertext, steps, self._galois, rotated)
        return rotated

    def rescale(self, ciphertext: Ciphertext) -> Ciphertext:
        """Lower `ciphertext`, which is changed and returned, by one level to the scale of that level."""
        self._evaluator.rescale_to_next_inplace(ciphertext)
        ciphertext.scale = self.ckks.scales[self.ckks.level_of(ciphertext)]  # they differ by rounding errors only
        return ciphertext
