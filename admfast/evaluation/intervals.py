"""Bootstrap intervals of measures that are a mean over images."""

from __future__ import annotations

import numpy as np
from torch import Tensor

Interval = tuple[float, float]
_RESAMPLES, _LEVEL = 1000, 0.95


def bootstrap_interval(contributions: Tensor, seed: int = 0) -> Interval:
    """Return the 95 % interval of the mean of `contributions` [N] over 1,000 resamples of the images.

    It says how far the measure would move with other images of this set only: the neighbourhoods that the
    contributions were computed from stay as they are, so two new sets vary more. It is not for measures that
    resampling biases, such as FID. Source: Efron 1979 (percentile method).
    """
    values = contributions.double().cpu().numpy()
    rng, means = np.random.default_rng(seed), []
    for _ in range(_RESAMPLES):
        means.append(values[rng.integers(len(values), size=len(values))].mean())
    low, high = np.quantile(means, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)
