"""Inception Score: how sure a classifier is of single images, and how varied its classes are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from admfast import checks
from admfast.evaluation.statistics import feature_rows

SPLIT_SIZE = 5000  # the published evaluator's


def inception_score(probabilities: Any, split_size: int = SPLIT_SIZE) -> float:
    """Return the mean over splits of exp(mean_x KL(p(y | x) || p(y))), p(y) being the mean over the split.

    Source: Salimans et al. 2016; the published evaluator splits in the order of the images, and the last
    split may be shorter. Accumulates in float64; not differentiable. A probability of 0 counts 0 (the
    published code would give NaN).

    Args:
        probabilities: [N, K], the class probabilities of each image.
        split_size: number of images in a split.

    Raises:
        InvalidArgument: for another shape, NaN or infinity, or a split size below 1.
    """
    rows = feature_rows("probabilities", probabilities, 1).double()
    split_size = checks.whole_number("split_size", split_size, 1)
    return float(torch.stack([_score(part) for part in rows.split(split_size)]).mean())


def _score(p: Tensor) -> Tensor:
    """Return the score of one split [n, K]."""
    divergence = torch.special.xlogy(p, p) - torch.special.xlogy(p, p.mean(0, keepdim=True))
    return divergence.sum(1).mean().exp()
