"""Division of patients among sites: evenly, by label, by size; and how many of them have a label."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise

import numpy as np

from nightsplit.site_worker.data.dataset import Dataset, Splits
from nightsplit.site_worker.data.split import shuffled

FEWEST = 8
"""Training patients of a site; shares that leave a site less are drawn again, as by Li et al., ICDE 2022."""

Shares = Callable[[np.random.Generator, int, int], np.ndarray]
"""Draws shares (classes, sites); each row sums to 1."""


def _even(random: np.random.Generator, classes: int, sites: int) -> np.ndarray:
    return np.full((classes, sites), 1 / sites)


def _dirichlet(alpha: float, random: np.random.Generator, classes: int, sites: int) -> np.ndarray:
    return random.dirichlet([alpha] * sites, size=classes)


def _one_large(ratio: float, random: np.random.Generator, classes: int, sites: int) -> np.ndarray:
    sizes = np.array([ratio] + [1.0] * (sites - 1))
    return np.tile(sizes / sizes.sum(), (classes, 1))


IID = "IID"
DIVISIONS: Mapping[str, Shares] = {
    IID: _even,
    "Dirichlet 1.0": partial(_dirichlet, 1.0),
    "Dirichlet 0.1": partial(_dirichlet, 0.1),
    "sizes 8:1:1": partial(_one_large, 8.0),
}
"""Dirichlet: each class by shares of its own (Hsu, Qi and Brown, arXiv 1909.06335). The lower, the more skewed."""


def divide(whole: Splits, sites: Sequence[str], division: str, seed: int) -> dict[str, Splits]:
    """Divide the training patients among sites by a key of `DIVISIONS`, and held-out patients evenly.

    Held-out patients are the same together in every division, so that divisions can be compared.

    Args:
        whole: of a classification task.
        sites: their names.
        division: key of `DIVISIONS`.
        seed: of the run.
    """
    train = _among(whole.train, len(sites), DIVISIONS[division], seed)
    validation, test = (_among(part, len(sites), _even, seed) for part in (whole.validation, whole.test))
    return {site: Splits(*splits) for site, *splits in zip(sites, train, validation, test, strict=True)}


def keep(dataset: Dataset, share: float, seed: int) -> Dataset:
    """A share of the patients of each class, at least one; a larger share contains every smaller one."""
    classes = _by_class(dataset, f"labels/{seed}")
    kept = {name for names in classes for name in names[: max(1, round(share * len(names)))]}
    return dataset.select([row for row, name in enumerate(dataset.patients) if name in kept])


def _among(dataset: Dataset, sites: int, draw: Shares, seed: int) -> list[Dataset]:
    classes = _by_class(dataset, f"division/{seed}")
    random = np.random.default_rng(seed)
    fewest = min(FEWEST, sum(len(names) for names in classes) // (4 * sites))
    while True:
        site_of = {}
        for names, shares in zip(classes, draw(random, len(classes), sites), strict=True):
            edges = [0, *np.round(shares.cumsum()[:-1] * len(names)).astype(int).tolist(), len(names)]
            for site, (first, last) in enumerate(pairwise(edges)):
                site_of.update(dict.fromkeys(names[first:last], site))
        of_site = Counter(site_of.values())
        if min(of_site[site] for site in range(sites)) >= fewest:
            break
    rows: list[list[int]] = [[] for _ in range(sites)]
    for row, name in enumerate(dataset.patients):
        rows[site_of[name]].append(row)
    return [dataset.select(chosen) for chosen in rows]


def _by_class(dataset: Dataset, seed: str) -> list[list[str]]:
    """Patients by the class of their first row, shuffled."""
    label = dict(reversed(list(zip(dataset.patients, dataset.targets.tolist(), strict=True))))
    names: defaultdict[float, list[str]] = defaultdict(list)
    for name, target in label.items():
        names[target].append(name)
    return [shuffled(names[target], seed) for target in sorted(names)]
