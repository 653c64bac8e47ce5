"""Kernel Inception Distance: the squared maximum mean discrepancy with a cubic kernel."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from admfast import checks
from admfast.errors import invalid
from admfast.evaluation.statistics import feature_rows

SUBSETS, SUBSET_SIZE = 100, 1000


class KernelDistance(NamedTuple):
    """Mean and standard deviation of the distance over subsets."""

    mean: float
    std: float


def kernel_distance(
    samples: Any, reference: Any, subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE, seed: int = 0
) -> KernelDistance:
    """Return the mean over random subsets of the unbiased MMD^2 with k(x, y) = (x . y / D + 1)^3.

    Source: Binkowski et al. 2018. Unlike FID, its expectation doesn't depend on the number of images.
    Computed in float64; not differentiable.

    Args:
        samples, reference: features [N, D].
        subsets: number of pairs of subsets.
        subset_size: rows in each, drawn without replacement; fewer if a set has fewer.
        seed: of the draws.

    Raises:
        InvalidArgument: for other shapes, different widths, fewer than 2 rows, NaN or infinity.
    """
    a, b = feature_rows("samples", samples), feature_rows("reference", reference)
    if a.shape[1] != b.shape[1]:
        raise invalid("samples", f"features of width {a.shape[1]}", f"width {b.shape[1]}, as the reference")
    subsets = checks.whole_number("subsets", subsets, 1)
    seed = checks.whole_number("seed", seed, 0)
    size = min(checks.whole_number("subset_size", subset_size, 2), len(a), len(b))
    rng, values = np.random.default_rng(seed), []
    for _ in range(subsets):
        x, y = (rows[rng.choice(len(rows), size, replace=False)].double() for rows in (a, b))
        values.append(float(_mmd(x, y)))
    return KernelDistance(float(np.mean(values)), float(np.std(values)))


def _mmd(x: Tensor, y: Tensor) -> Tensor:
    """Return the unbiased estimate of MMD^2 of x and y, [n, D] each."""
    n = len(x)
    within = sum(k.sum() - k.diagonal().sum() for k in (_kernel(x, x), _kernel(y, y)))
    return torch.as_tensor(within) / (n * (n - 1)) - 2 * _kernel(x, y).mean()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3
