"""nightsplit merge: add up the published vectors of a data_vectors run again, with a hospital more or one less."""

import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save

from nightsplit.console.output import write_output
from nightsplit.server_worker.published_vectors import BASE, FOLDER, merge, read_vector
from nightsplit.shared.errors import ConfigError
from nightsplit.shared.foreign import shown
from nightsplit.shared.models.hashing import weights_sha256


def run_merge(report: Path, output: Path, added: Sequence[Path], left_out: Sequence[str], scale: float | None) -> int:
    """Write the merged model and say what is in it.

    Args:
        report: report folder of a data_vectors run.
        output: file of the merged model.
        added: files of more vectors.
        left_out: sites to leave out.
        scale: factor of the sum; None for the one that the run chose.

    Raises:
        ConfigError: 103 there is no such site, or no scale; 115-117 as `read_vector` and `merge`.
    """
    folder = report / FOLDER
    base = read_vector(folder / f"{BASE}.safetensors")
    found = [read_vector(path) for path in sorted(folder.glob("*.safetensors")) if path.stem != BASE]
    vectors = {vector.name: vector for vector in [*found, *(read_vector(path) for path in added)]}
    for site in left_out:
        if vectors.pop(site, None) is None:
            raise ConfigError(103, f"--without {site}: not among {', '.join(vectors)}.", "correct the name.")
    factor = base.scale if scale is None else scale
    if factor is None:
        raise ConfigError(103, f"{folder} holds no scale, since nobody judged one.", "give one: --scale 0.3.")
    weights = merge(base, list(vectors.values()), factor)
    write_output(output, save({name: tensor.contiguous() for name, tensor in weights.items()}))
    print(shown(f"{output}: {factor:g} x ({' + '.join(sorted(vectors)) or 'nothing'})"))
    print(f"sha256 of the model: {weights_sha256(weights)}")
    if base.buffers:
        print("statistics of normalizations are those of the sum; measure them anew before you use it", file=sys.stderr)
    return 0
