"""The networks that `model.factory` in run.toml names, and `Halves` for factories of your own."""

from nightsplit.shared.models.networks import ct_cnn, mlp, small_cnn
from nightsplit.shared.models.partition import Halves
from nightsplit.shared.models.segmentation import monet, unet
from nightsplit.shared.models.sequences import clstm

__all__ = ["Halves", "clstm", "ct_cnn", "mlp", "monet", "small_cnn", "unet"]
