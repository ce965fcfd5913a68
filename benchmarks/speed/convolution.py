"""Convolution of encrypted images: the variant closest to Yue et al., who encrypt the images themselves.

    outputs = mean over 2 x 2 of (convolution 3 x 3 + bias)^2              one level

A ciphertext per pixel with an image in each slot, so that nothing is rotated. The square takes the place of ReLU
(CryptoNets, Gilad-Bachrach et al., ICML 2016). Four outputs that share a mean take 16 products in place of 36
(Winograd's minimal filtering, Lavin and Gray, CVPR 2016), and one relinearization: their squares are added before.

Weights are whole numbers of 1 / `UNIT`, which leaves the scale as it is: products need no rescaling, and two large
primes do what three small ones did. The outputs are 1 / `UNIT`^2 too, so the site multiplies what it decrypts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from nightsplit.server_worker.he.arithmetic import Arithmetic
from nightsplit.shared.he.ckks import Ciphertext, CkksParameters, Plaintext
from nightsplit.shared.he.weights import FloatArray

Grid = Sequence[Sequence[Ciphertext]]

CIRCUIT = CkksParameters(8192, (60, 60, 60), 30)
"""For outputs below 256."""
UNIT = 2.0**-25
"""As exact as weights are."""
WEIGHTS = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
"""G of the minimal filtering: 3 weights to 4."""


def convolved(arithmetic: Arithmetic, filters: FloatArray, bias: FloatArray, pixels: Grid) -> list[Grid]:
    """Return the output of each filter.

    Args:
        arithmetic: of the site.
        filters: float64 (filters, 3, 3).
        bias: (filters,).
        pixels: rows of ciphertexts of the highest level; height and width are even and at least 4.

    Returns:
        For each filter, (height - 2) / 2 rows of (width - 2) / 2 ciphertexts, one level below the pixels, of numbers
        that are outputs / `UNIT`^2.
    """
    ckks, half = arithmetic.ckks, 0.5 / UNIT  # half of everything, so that the sum of four squares is their mean
    weights = [
        [[ckks.encode(weight, ckks.top, 1.0) for weight in row] for row in (WEIGHTS @ one @ WEIGHTS.T).tolist()]
        for one in half * filters
    ]
    found: list[list[list[Ciphertext]]] = [[] for _ in filters]
    for row in range(0, len(pixels) - 2, 2):
        for done in found:
            done.append([])
        for column in range(0, len(pixels[0]) - 2, 2):
            tile = _inputs(arithmetic, [line[column : column + 4] for line in pixels[row : row + 4]])
            for done, plains, add in zip(found, weights, (half * bias).tolist(), strict=True):
                done[-1].append(_mean(arithmetic, tile, plains, add))
    return list(found)


def _mean(arithmetic: Arithmetic, tile: Grid, weights: Sequence[Sequence[Plaintext]], bias: float) -> Ciphertext:
    """Return the mean of four outputs squared; `tile` and `weights` are 4 x 4."""
    products = [
        [arithmetic.dot_plain([term]) for term in zip(*rows, strict=True)] for rows in zip(tile, weights, strict=True)
    ]
    outputs = [arithmetic.add_plain(one, bias) for row in _outputs(arithmetic, products) for one in row]
    return arithmetic.dot([(one, one) for one in outputs])


def _inputs(arithmetic: Arithmetic, tile: Grid) -> Grid:
    """B' d B of the minimal filtering: 4 x 4 pixels to as many sums."""
    plus, minus = arithmetic.sum, arithmetic.subtract
    return _both_ways(lambda d: [minus(d[0], d[2]), plus([d[1], d[2]]), minus(d[2], d[1]), minus(d[1], d[3])], tile)


def _outputs(arithmetic: Arithmetic, products: Grid) -> Grid:
    """A' m A: 4 x 4 products to 2 x 2 outputs."""
    plus, minus = arithmetic.sum, arithmetic.subtract
    return _both_ways(lambda m: [plus([m[0], m[1], m[2]]), minus(minus(m[1], m[2]), m[3])], products)


def _both_ways(transform: Callable[[Sequence[Ciphertext]], list[Ciphertext]], grid: Grid) -> Grid:
    """Every row, and then every column."""
    columns = [transform(column) for column in zip(*map(transform, grid), strict=True)]
    return list(zip(*columns, strict=True))
