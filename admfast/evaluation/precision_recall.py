"""Precision, recall, density and coverage: how two sets of features lie in each other's neighbourhoods."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from admfast import checks
from admfast.engine.numerics import fixed_numerics
from admfast.errors import invalid
from admfast.evaluation.neighbours import distance_strips, neighbour_radii
from admfast.evaluation.statistics import feature_rows


@dataclass(frozen=True, eq=False)
class Neighbourhoods:
    """Contributions of each feature to the measures, which are means of them over a set.

    Attributes:
        precision: [N] of the samples: 1 within the neighbourhood of some reference feature.
        recall: [M] of the reference: 1 within the neighbourhood of some sample.
        density: [N] of the samples: neighbourhoods of the reference that contain it, divided by k.
        coverage: [M] of the reference: 1 if some sample is within its neighbourhood.
    """

    precision: Tensor
    recall: Tensor
    density: Tensor
    coverage: Tensor


def precision_recall(
    samples: Any, reference: Any, k: int = 3, half: bool = True, open_balls: bool = False
) -> tuple[float, float]:
    """Return precision and recall of samples [N, D] against reference features [M, D].

    The neighbourhood of a feature is the ball around it that reaches its k-th nearest neighbour in its own
    set. Precision is the share of samples in neighbourhoods of the reference; recall is the share of the
    reference in neighbourhoods of the samples. Beside 10,000 and 10,000 features of width 2048 it
    takes 0.6 GB. Not differentiable.

    Source: Kynkaanniemi et al. 2019, as the published evaluator computes it (k = 3, half precision).

    Args:
        samples, reference: features (array or tensor); computed on their device.
        k: neighbours, from 1 to one less than the smaller set has rows.
        half: round distances to float16 as the published evaluator does, in blocks of 10,000 x 10,000, and
            compute a block with an overflow in float32. False: all in float32. The two differ by up to 0.005.
        open_balls: leave out the surface of a ball, as Naeem et al. 2020 do.

    Raises:
        InvalidArgument: for other shapes, different widths, too few rows, NaN or infinity.
    """
    found = neighbourhoods(samples, reference, k, half, open_balls)
    return float(found.precision.double().mean()), float(found.recall.double().mean())


def density_coverage(samples: Any, reference: Any, k: int = 5) -> tuple[float, float]:
    """Return density and coverage of samples [N, D] against reference features [M, D].

    Density is the mean number of reference neighbourhoods (open balls) that contain a sample, divided by k;
    it may exceed 1. Coverage is the share of reference neighbourhoods that contain a sample. In float32.

    Source: Naeem et al. 2020. Arguments and errors: see `precision_recall`.
    """
    found = neighbourhoods(samples, reference, k, half=False, open_balls=True)
    return float(found.density.double().mean()), float(found.coverage.double().mean())


def coverage_of_alike_sets(samples: int, reference: int, k: int) -> float:
    """Return the expected coverage of `samples` features N of the same distribution as the reference's M.

    It is 1 - prod_{i < k} (M - 1 - i) / (N + M - 1 - i): a neighbourhood has no sample if the k features
    nearest to its centre, of all others, are of the reference.
    """
    return 1 - math.prod((reference - 1 - i) / (samples + reference - 1 - i) for i in range(k))


def neighbourhoods(
    samples: Any, reference: Any, k: int = 3, half: bool = True, open_balls: bool = False
) -> Neighbourhoods:
    """Return the contribution of each feature to the four measures. Arguments: see `precision_recall`."""
    a, b = feature_rows("samples", samples), feature_rows("reference", reference)
    if a.shape[1] != b.shape[1]:
        raise invalid("samples", f"features of width {a.shape[1]}", f"width {b.shape[1]}, as the reference")
    k = checks.whole_number("k", k, 1)
    for name, rows in (("samples", a), ("reference", b)):
        if k >= len(rows):
            raise invalid("k", k, f"below the number of {name}, which is {len(rows)}")
    inside = torch.lt if open_balls else torch.le
    counts = torch.zeros(len(a), dtype=torch.int64, device=a.device)
    recall, coverage = (torch.zeros(len(b), dtype=torch.bool, device=b.device) for _ in range(2))
    with fixed_numerics(a.device):
        sample_radii, reference_radii = (neighbour_radii(rows, k, half) for rows in (a, b))
        # The reference comes first, as in the published evaluator: float16 sums depend on it.
        for part, columns, distances in distance_strips(b, a, half):
            in_reference = inside(distances, reference_radii[part, None])
            counts[columns] += in_reference.sum(0)
            coverage[part] |= in_reference.any(1)
            recall[part] |= inside(distances, sample_radii[columns]).any(1)
    return Neighbourhoods(counts > 0, recall, counts / k, coverage)
