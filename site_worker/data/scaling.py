"""Scaling of inputs to mean 0 and standard deviation 1, and imputation of missing values.

There are no columns that mark missing values. On the four hospitals of UCI Heart Disease (20 seeds) such columns
raised the pooled AUC from 0.84 to 0.87 and lowered it within three of the four hospitals, by 0.01 to 0.03: missing
values reveal the hospital, and with it the prevalence among its patients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nightsplit.shared.config.run import DataSection
from nightsplit.shared.errors import ConfigError
from nightsplit.site_worker.data.dataset import Dataset, Splits


@dataclass(frozen=True, eq=False)
class Scaling:
    """Scaling (input - mean) / spread, with `fill` in place of missing values.

    All three are float32, (features,) for a table and (channels, 1, 1) for images; frames count as channels.
    """

    mean: torch.Tensor
    spread: torch.Tensor
    fill: torch.Tensor

    @classmethod
    def fit(cls, train: Dataset, data: DataSection) -> Scaling:
        """Fit the scaling of `data.scaling` to the training patients.

        "site" is mean and standard deviation of the measured values, per feature, or per channel over all pixels.
        "run" is `data.mean` and `data.spread`. A missing value becomes the mean, hence 0; with "none" it becomes the
        mean of the training patients. A feature without any measured value becomes 0, and a constant feature has
        spread 1.

        Raises:
            ConfigError: 103 "run" without one mean and one spread per feature or channel.
        """
        width, trailing = train.inputs.shape[1], [1] * (train.inputs.ndim - 2)
        mean, spread = _measure(train.inputs)
        fill = mean
        if data.scaling == "none":
            mean, spread = torch.zeros(width), torch.ones(width)
        elif data.scaling == "run":
            if not len(data.mean) == len(data.spread) == width or not all(value > 0 for value in data.spread):
                lengths = f"data.mean has {len(data.mean)} numbers, data.spread {len(data.spread)}"
                sentence = f"run.toml: {lengths}, the data {width} {'channels' if trailing else 'features'}."
                remedy = 'give one mean and one spread above 0 for each, or use scaling = "site".'
                raise ConfigError(103, sentence, remedy)
            mean, spread = torch.tensor(data.mean), torch.tensor(data.spread)
            fill = mean
        return cls(*(values.reshape(-1, *trailing) for values in (mean, spread, fill)))

    def apply(self, dataset: Dataset) -> Dataset:
        """Return the dataset with scaled inputs, without NaN."""
        filled = torch.where(dataset.inputs.isnan(), self.fill, dataset.inputs)
        return Dataset((filled - self.mean) / self.spread, dataset.targets, dataset.patients)


def scale(splits: Splits, data: DataSection) -> Splits:
    """Scale all splits by the training split."""
    scaling = Scaling.fit(splits.train, data)
    return Splits(scaling.apply(splits.train), scaling.apply(splits.validation), scaling.apply(splits.test))


def _measure(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation, float32 (width,), over all dimensions but 1, without NaN."""
    mean, spread = [], []
    for values in inputs.transpose(0, 1):
        measured = values[~values.isnan()]
        deviation = measured.std(correction=0).item() if len(measured) else 0.0
        mean.append(measured.mean(dtype=torch.float64).item() if len(measured) else 0.0)
        spread.append(deviation if deviation > 1e-6 * max(1.0, abs(mean[-1])) else 1.0)
    return torch.tensor(mean), torch.tensor(spread)
