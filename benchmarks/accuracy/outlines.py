"""A picture of segmentations: test slices with the outlines of their masks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import torch

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.protocols.build import build_whole_model
from nightsplit.site_worker.data.dataset import Splits

COLOURS = ("white", "tab:cyan", "tab:orange")
"""Colours of the truth and of two models."""


def draw(
    parts: Mapping[str, Splits], models: Mapping[str, tuple[RunConfig, Mapping[str, torch.Tensor]]], path: Path
) -> None:
    """Two slices of a test volume of each site.

    Args:
        parts: of the sites.
        models: run and weights, by the name in the legend; two at most.
        path: of the picture.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot

    images, truth = _chosen(parts)
    masks = {"truth": truth, **{name: _predicted(*model, images) for name, model in models.items()}}
    rows, columns = (images.amax(0) > 0).numpy().nonzero()  # without the padding
    figure, places = pyplot.subplots(1, len(images), figsize=(1.5 * len(images), 2.0))
    for number, place in enumerate(places):
        place.imshow(images[number].numpy(), cmap="gray", vmin=0, vmax=1)
        for (name, mask), colour in zip(masks.items(), COLOURS, strict=False):
            if mask[number].max() > 0.5:
                place.contour(mask[number].numpy(), levels=[0.5], colors=colour, linewidths=1.0)
            place.plot([], [], color=colour, label=name)
        place.set(xlim=(columns.min(), columns.max()), ylim=(rows.max(), rows.min()))
        place.axis("off")
    handles, labels = places[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), fontsize=8, facecolor="grey")
    figure.subplots_adjust(left=0.005, right=0.995, top=0.99, bottom=0.16, wspace=0.03)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def _predicted(config: RunConfig, weights: Mapping[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """Probability of foreground, (n, h, w)."""
    module = build_whole_model(config, Path()).module.eval()
    module.load_state_dict(dict(weights))
    with torch.no_grad():
        return torch.sigmoid(module(images[:, None])).squeeze(1)


def _chosen(parts: Mapping[str, Splits]) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and masks (n, h, w): of a site's first test volume the largest mask, and one near the organ's end."""
    images, masks = [], []
    for part in parts.values():
        test = part.test
        rows = [row for row, patient in enumerate(test.patients) if patient == test.patients[0]]
        sizes = test.targets[rows].sum((1, 2))
        filled = sizes.nonzero().squeeze(1)
        for place in (int(sizes.argmax()), int(filled[len(filled) // 8])):
            images.append(test.inputs[rows[place], 0])
            masks.append(test.targets[rows[place]])
    return torch.stack(images), torch.stack(masks)
