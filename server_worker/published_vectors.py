"""Published data vectors, which can be merged again at any time, with more or fewer hospitals, without training.

    report/vectors/base.safetensors     theta_pre, and the scale that the run chose
                   north.safetensors    tau of north
                   south.safetensors

Vectors are always added in the order of their sites' names, and a site counts once: adding a late hospital, or
removing one, gives bit for bit the sum of a run with exactly these hospitals. They are published as they were sent, and
combined robustly whenever they are added.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from nightsplit.server_worker.aggregation import Aggregation
from nightsplit.shared.config.run import RoundSection
from nightsplit.shared.errors import ConfigError
from nightsplit.shared.models.hashing import weights_sha256
from nightsplit.shared.models.layout import WeightLayout
from nightsplit.shared.storage.files import write_atomic
from nightsplit.shared.storage.tensors import as_safetensors

FOLDER = "vectors"
"""Name of the vectors' folder in the report folder."""
BASE = "base"
"""Name of the file with theta_pre; no site may have this name."""


@dataclass(frozen=True, eq=False)
class Vector:
    """Vector in a file.

    Attributes:
        values: float32 (length,), as `WeightLayout.vector` encodes weights.
        shapes: shapes of the weights, by name.
        buffers: names of the weights that are statistics.
        base_sha256: sha256 of theta_pre.
        name: the site, or `BASE`.
        scale: the scale that the run chose, in theta_pre's file; None otherwise.
    """

    path: Path
    values: torch.Tensor
    shapes: Mapping[str, tuple[int, ...]]
    buffers: frozenset[str]
    base_sha256: str
    name: str
    scale: float | None


def sum_vectors(vectors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """Return the sum of one or more vectors, and the factor of each outlier among them.

    From three on, the sum is their number times their geometric median, so that no vector outweighs the others. It is
    bit-identical, whatever their order.
    """
    aggregation = Aggregation(RoundSection())
    for name, vector in vectors.items():
        aggregation.add(name, [vector], weight=1.0)
    return len(vectors) * next(aggregation.result()), aggregation.outliers()


def publish(
    folder: Path, layout: WeightLayout, base: torch.Tensor, vectors: Mapping[str, torch.Tensor], scale: float | None
) -> None:
    """Write the vectors of a finished run below its report folder.

    `base` is theta_pre, float32 (length,); `vectors` are tau by site, likewise; `scale` is the one that the run chose.
    """
    folder = folder / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    common = {
        "shapes": json.dumps({name: list(shape) for name, shape in layout.shapes.items()}),
        "buffers": json.dumps(sorted(layout.buffers)),
        "base_sha256": weights_sha256({"": base}),  # as one tensor without a name
    }
    chosen = {} if scale is None else {"scale": repr(scale)}
    write_atomic(folder / f"{BASE}.safetensors", as_safetensors({"vector": base}, {**common, **chosen, "name": BASE}))
    for site, values in vectors.items():
        write_atomic(folder / f"{site}.safetensors", as_safetensors({"vector": values}, {**common, "name": site}))


def merge(base: Vector, vectors: list[Vector], scale: float) -> dict[str, torch.Tensor]:
    """Return base + scale * sum of vectors, as weights by name; a duplicate counts once.

    ConfigError 116 if a vector belongs to another theta_pre, 117 to another network or other classes.
    """
    for vector in vectors:
        if vector.shapes != base.shapes:
            names = sorted({*vector.shapes, *base.shapes})
            differ = [name for name in names if vector.shapes.get(name) != base.shapes.get(name)]
            sentence = f"{vector.path}: {', '.join(differ[:3])} differ from {base.path}."
            raise ConfigError(117, sentence, "only vectors of one network with the same classes can be added.")
        if vector.base_sha256 != base.base_sha256:
            theirs, ours = vector.base_sha256[:12], base.base_sha256[:12]
            sentence = f"{vector.path} was trained from model {theirs}, but {base.path} is model {ours}."
            raise ConfigError(116, sentence, "ask that hospital to begin from the same published model.")
    layout = WeightLayout(base.shapes, slice_length=len(base.values), buffers=base.buffers)
    if not vectors:
        return layout.weights(base.values)
    total, _ = sum_vectors({vector.name: vector.values for vector in vectors})
    return layout.weights(base.values + scale * total)


def read_vector(path: Path) -> Vector:
    """Read a file written by `publish`; ConfigError 115 when it cannot be read, or is another kind of file."""
    try:
        with safe_open(path, framework="pt") as file:
            facts, values = file.metadata(), file.get_tensor("vector")
        shapes = {name: tuple(shape) for name, shape in json.loads(facts["shapes"]).items()}
        scale = float(facts["scale"]) if "scale" in facts else None
        buffers = frozenset(json.loads(facts["buffers"]))
        if any(type(length) is not int or length < 0 for shape in shapes.values() for length in shape):
            raise ValueError("a shape that no tensor has")
        if (values.dtype, values.shape) != (torch.float32, (sum(map(math.prod, shapes.values())),)):
            raise ValueError("its values do not fit its shapes")
        if not (values.isfinite().all() and math.isfinite(scale or 0)):
            raise ValueError("its values are not finite")
        return Vector(path, values, shapes, buffers, facts["base_sha256"], facts["name"], scale)
    except (OSError, SafetensorError, LookupError, AttributeError, TypeError, ValueError, RecursionError) as error:
        sentence = f"{path} is not the file of a data vector ({error})."
        raise ConfigError(115, sentence, "name the vectors folder of a report, or its files.") from None
