"""Sums and products of ciphertexts that keep to the levels and scales of the agreed parameters."""

from collections.abc import Iterable, Sequence

import numpy as np
import tenseal.sealapi as seal
from numpy.typing import ArrayLike

from nightsplit.shared.he.ckks import Ciphertext, CkksParameters, Plaintext, PublicKeys


class Arithmetic:
    """Computes with the ciphertexts of one site.

    Args:
        ckks: the agreed one.
        keys: of the site.
        rotations: steps that will be used; those of the packing.

    Raises:
        Refused: 313 the keys are not of these parameters, or do not suffice.
    """

    def __init__(self, ckks: CkksParameters, keys: PublicKeys, rotations: Sequence[int] = ()) -> None:
        self.ckks = ckks
        self._evaluator = seal.Evaluator(ckks.context)
        self._relin = ckks.read_relin(keys.relin)
        self._galois = ckks.read_galois(keys.galois, rotations) if rotations else None

    def weighted(self, weights: ArrayLike, inputs: Sequence[Ciphertext], bias: float = 0.0) -> Ciphertext:
        """sum_j weights_j inputs_j + bias, in every slot; one level below the inputs, which are of one level."""
        level = self.ckks.level_of(inputs[0])
        plains = (self.ckks.encode(weight, level) for weight in np.asarray(weights).tolist())
        return self.plus(self.rescaled(self.combined(zip(inputs, plains, strict=True))), bias)

    def combined(self, terms: Iterable[tuple[Ciphertext, Plaintext]]) -> Ciphertext:
        """The sum of ciphertexts times what was encoded for their level, slot by slot; to be `rescaled`."""
        total = None
        for given, plain in terms:
            if plain.is_zero():
                continue  # SEAL refuses a product that would show nothing
            term = seal.Ciphertext()
            self._evaluator.multiply_plain(given, plain, term)
            if total is None:
                total = term
            else:
                self._evaluator.add_inplace(total, term)
        if total is None:  # nothing but zeros: the smallest number that can be encoded is one, and SEAL takes it
            least = self.ckks.encode(1.0 / plain.scale, self.ckks.level_of(given), plain.scale)
            total = seal.Ciphertext()
            self._evaluator.multiply_plain(given, least, total)
        return total

    def plus(self, given: Ciphertext, numbers: float | Sequence[float]) -> Ciphertext:
        """`given`, changed: the numbers are added."""
        if not isinstance(numbers, float) or numbers:
            level = self.ckks.level_of(given)
            self._evaluator.add_plain_inplace(given, self.ckks.encode(numbers, level, given.scale))
        return given

    def minus(self, given: Ciphertext, numbers: Sequence[float]) -> Ciphertext:
        """`given`, changed: the numbers are taken away."""
        level = self.ckks.level_of(given)
        self._evaluator.sub_plain_inplace(given, self.ckks.encode(numbers, level, given.scale))
        return given

    def products(self, pairs: Sequence[tuple[Ciphertext, Ciphertext]]) -> Ciphertext:
        """The sum of products of pairs, one level below the lowest of all; for a single relinearization."""
        level = min(self.ckks.level_of(one) for pair in pairs for one in pair)
        total = None
        for one, other in pairs:
            term = seal.Ciphertext()
            if one is other:
                self._evaluator.square(self.lowered(one, level), term)
            else:
                self._evaluator.multiply(self.lowered(one, level), self.lowered(other, level), term)
            if total is None:
                total = term
            else:
                self._evaluator.add_inplace(total, term)
        self._evaluator.relinearize_inplace(total, self._relin)
        return self.rescaled(total)

    def sum(self, terms: Sequence[Ciphertext]) -> Ciphertext:
        """Of the level of the lowest."""
        level = min(map(self.ckks.level_of, terms))
        total = seal.Ciphertext()
        self._evaluator.add_many([self.lowered(term, level) for term in terms], total)
        return total

    def difference(self, one: Ciphertext, other: Ciphertext) -> Ciphertext:
        """Of two ciphertexts of one level."""
        left = seal.Ciphertext()
        self._evaluator.sub(one, other, left)
        return left

    def lowered(self, given: Ciphertext, level: int) -> Ciphertext:
        """The same numbers at a lower level, with its scale."""
        if self.ckks.level_of(given) == level:
            return given
        above, one = seal.Ciphertext(), seal.Ciphertext()
        self._evaluator.mod_switch_to(given, self.ckks.ids[level + 1], above)
        wanted = self.ckks.scales[level] * self.ckks.primes[level + 1] / above.scale
        self._evaluator.multiply_plain(above, self.ckks.encode(1.0, level + 1, wanted), one)
        return self.rescaled(one)

    def bottom(self, given: Ciphertext) -> Ciphertext:
        """The same numbers at level 0 with the scale they have: only decryption is left."""
        lowest = seal.Ciphertext()
        self._evaluator.mod_switch_to(given, self.ckks.ids[0], lowest)
        return lowest

    def rotated(self, given: Ciphertext, steps: int) -> Ciphertext:
        """Slot k of the result is slot k + steps; needs the site's key for this step."""
        turned = seal.Ciphertext()
        self._evaluator.rotate_vector(given, steps, self._galois, turned)
        return turned

    def rescaled(self, given: Ciphertext) -> Ciphertext:
        """`given`, changed: one level lower, with the scale of that level."""
        self._evaluator.rescale_to_next_inplace(given)
        given.scale = self.ckks.scales[self.ckks.level_of(given)]  # but for the rounding of a float
        return given
