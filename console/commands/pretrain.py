"""nightsplit pretrain: stage 1 of a transfer."""

from pathlib import Path
from typing import Annotated

from typer import Argument


def pretrain(
    file: Annotated[Path, Argument(metavar="PRETRAIN.TOML", help="the model, the data sets and their training")],
) -> None:
    """Train a first model on public data.

    Stage 1 of a transfer: train a network on public data, and write a file with its weights and a card that
    describes the data. A run of fedavg_transfer or data_vectors starts from this file.
    """
    from nightsplit.console.pretrain import train_first_model

    train_first_model(file)
