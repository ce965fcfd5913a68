"""The networks that `model.factory` in run.toml names, and `ModelParts` for factories of your own."""

from nightsplit.shared.models.networks import ct_cnn, mlp, small_cnn
from nightsplit.shared.models.partition import ModelParts
from nightsplit.shared.models.segmentation import monet, unet
from nightsplit.shared.models.sequences import clstm

__all__ = ["ModelParts", "clstm", "ct_cnn", "mlp", "monet", "small_cnn", "unet"]
