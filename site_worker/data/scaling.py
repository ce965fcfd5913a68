"""Bringing inputs to mean 0 and spread 1, and filling in what was not measured.

No column tells the model that a value was missing. On the four hospitals of UCI Heart Disease (20 seeds)
such columns raised the pooled AUC from 0.84 to 0.87 and lowered it within three of the four hospitals, by
0.01 to 0.03: what was not measured gives away the hospital, and with it how many of its patients are ill.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nightsplit.shared.config.run import DataSection
from nightsplit.shared.errors import ConfigError
from nightsplit.site_worker.data.dataset import Dataset, Splits


@dataclass(frozen=True, eq=False)
class Scaling:
    """(input - mean) / spread, after missing values became `fill`.

    All three are float32, (features,) for a table and (channels, 1, 1) for images; frames count as channels.
    """

    mean: torch.Tensor
    spread: torch.Tensor
    fill: torch.Tensor

    @classmethod
    def fit(cls, train: Dataset, data: DataSection) -> Scaling:
        """The scaling that `data.scaling` asks for; it sees training patients only.

        "site" takes mean and standard deviation of what was measured, per feature, or per channel over
        all pixels. "run" takes `data.mean` and `data.spread`. A missing value becomes the mean, hence 0;
        with "none" it becomes the mean of the training patients. A feature that nobody at the site was
        measured for becomes 0 throughout, and a constant one keeps spread 1.

        Raises:
            ConfigError: 103 "run" without one mean and one spread per feature or channel.
        """
        width, trailing = train.inputs.shape[1], [1] * (train.inputs.ndim - 2)
        mean, spread = _moments(train.inputs)
        fill = mean
        if data.scaling == "none":
            mean, spread = torch.zeros(width), torch.ones(width)
        elif data.scaling == "run":
            if not len(data.mean) == len(data.spread) == width or not all(value > 0 for value in data.spread):
                given = f"data.mean has {len(data.mean)} figures, data.spread {len(data.spread)}"
                what = f"run.toml: {given}, the data {width} {'channels' if trailing else 'features'}."
                raise ConfigError(103, what, 'give one mean and one spread above 0 for each, or use scaling = "site".')
            mean, spread = torch.tensor(data.mean), torch.tensor(data.spread)
            fill = mean
        return cls(*(figures.reshape(-1, *trailing) for figures in (mean, spread, fill)))

    def apply(self, dataset: Dataset) -> Dataset:
        """The dataset with scaled inputs, free of NaN."""
        filled = torch.where(dataset.inputs.isnan(), self.fill, dataset.inputs)
        return Dataset((filled - self.mean) / self.spread, dataset.targets, dataset.patients)


def scale(splits: Splits, data: DataSection) -> Splits:
    """All splits, scaled as the training part asks for."""
    scaling = Scaling.fit(splits.train, data)
    return Splits(scaling.apply(splits.train), scaling.apply(splits.validation), scaling.apply(splits.test))


def _moments(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation, float32 (width,), of what is no NaN, over all but dimension 1."""
    mean, spread = [], []
    for values in inputs.transpose(0, 1):
        measured = values[~values.isnan()]
        some = len(measured) > 0
        deviation = measured.std(correction=0).item() if some else 0.0
        mean.append(measured.mean(dtype=torch.float64).item() if some else 0.0)
        spread.append(deviation if deviation > 1e-6 * max(1.0, abs(mean[-1])) else 1.0)
    return torch.tensor(mean), torch.tensor(spread)
