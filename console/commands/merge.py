"""nightsplit merge: the published vectors of a data_vectors run, merged again with other hospitals."""

import sys
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from nightsplit.console.output import write_output
from nightsplit.shared.errors import ConfigError
from nightsplit.shared.foreign import shown


def merge(
    report: Annotated[Path, Argument(metavar="REPORT", help="report folder of the run")],
    output: Annotated[Path, Option(metavar="FILE", help="file of the merged model")],
    added: Annotated[list[Path], Option("--with", metavar="FILE", help="add this vector")] = [],
    excluded: Annotated[list[str], Option("--without", metavar="SITE", help="leave this site's vector out")] = [],
    scale: Annotated[
        float | None, Option(metavar="FACTOR", help="scale of the sum (default: the scale of the run)")
    ] = None,
) -> None:
    """Add up published data vectors again.

    Add up the vectors in the report of a data_vectors run, with a hospital added or left out, and write the
    merged model. Nothing is trained.
    """
    from safetensors.torch import save

    from nightsplit.server_worker import published_vectors
    from nightsplit.server_worker.published_vectors import BASE, FOLDER, read_vector
    from nightsplit.shared.models.hashing import weights_sha256

    folder = report / FOLDER
    base = read_vector(folder / f"{BASE}.safetensors")
    found = [read_vector(path) for path in sorted(folder.glob("*.safetensors")) if path.stem != BASE]
    vectors = {vector.name: vector for vector in [*found, *(read_vector(path) for path in added)]}
    for site in excluded:
        if vectors.pop(site, None) is None:
            known = f"the run has vectors of {', '.join(vectors)} only."
            raise ConfigError(103, f"--without {site}: {known}", "correct the name.")
    factor = base.scale if scale is None else scale
    if factor is None:
        raise ConfigError(103, f"{folder} names no scale: the run evaluated none.", "give one: --scale 0.3.")
    weights = published_vectors.merge(base, list(vectors.values()), factor)
    write_output(output, save({name: tensor.contiguous() for name, tensor in weights.items()}))
    print(shown(f"{output}: base + {factor:g} x ({' + '.join(sorted(vectors)) or 'nothing'})"))
    print(f"sha256 of the model: {weights_sha256(weights)}")
    if base.buffers:
        warning = "warning: normalization statistics are sums, like weights; compute them again before use"
        print(warning, file=sys.stderr)
