"""Frechet distance between Gaussians: FID, sFID and FD by the features that are given."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from admfast.errors import invalid
from admfast.evaluation.statistics import Statistics, statistics_of


def frechet_distance(samples: Any, reference: Any) -> float:
    """Return |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of two sets of features.

    With S_a = F F^T, the trace of the square root is the sum of the roots of the eigenvalues of F^T S_b F,
    which is symmetric; so covariances that are singular need no correction. It agrees with the published
    evaluator's general matrix root to 5e-8. Computed in float64; not differentiable.

    Source: Dowson & Landau 1982; Heusel et al. 2017 (FID); Nash et al. 2021 (sFID, of spatial features).

    Args:
        samples, reference: features [N, D] (array or tensor, N of at least 2), or their `Statistics`.

    Raises:
        InvalidArgument: for other shapes, different widths, NaN or infinity.
    """
    a, b = (
        value if isinstance(value, Statistics) else statistics_of(value) for value in (samples, reference)
    )
    if a.mu.shape != b.mu.shape:
        raise invalid("samples", f"features of width {len(a.mu)}", f"width {len(b.mu)}, as the reference")
    factor = _factor(torch.from_numpy(a.sigma))
    values = torch.linalg.eigvalsh(factor.T @ torch.from_numpy(b.sigma) @ factor)
    overlap = float(values.clamp(min=0).sqrt().sum())
    difference = a.mu - b.mu
    distance = difference @ difference + np.trace(a.sigma) + np.trace(b.sigma) - 2 * overlap
    return max(0.0, float(distance))  # rounding makes that of equal sets negative


def _factor(sigma: Tensor) -> Tensor:
    """Return F with sigma = F F^T; eigenvalues that rounding made negative count as 0."""
    factor, failed = torch.linalg.cholesky_ex(sigma)  # five times as fast as the eigenvectors
    if not failed:
        return factor
    values, vectors = torch.linalg.eigh(sigma)
    return vectors * values.clamp(min=0).sqrt()
