"""Tensors as safetensors files."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file


def as_safetensors(
    tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> Callable[[Path], None]:
    """Return content for `write_atomic`: a safetensors file with these tensors, of any shape and dtype.

    Writing it raises OSError on failure, as for content in bytes.
    """

    def write(path: Path) -> None:
        try:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path, metadata)
        except SafetensorError as error:
            found = re.search(r"os error (\d+)", str(error))
            if found is None:
                raise
            number = int(found[1])
            raise OSError(number, os.strerror(number), str(path)) from None

    return write
