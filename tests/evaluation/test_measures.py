"""Tests of the measures on feature arrays: known answers, invariances, arguments."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from admfast.errors import InvalidArgument
from admfast.evaluation import (
    Statistics,
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    statistics_of,
)
from admfast.evaluation import neighbours as neighbours_file
from admfast.evaluation.intervals import bootstrap_interval
from admfast.evaluation.neighbours import neighbour_radii, squared_distances
from admfast.evaluation.precision_recall import neighbourhoods
from admfast.evaluation.statistics import StatisticsSum, merged
from tests.ops.tolerance import DEVICES


def features(rows, width=6, seed=0, shift=0.0):
    return np.random.default_rng(seed).standard_normal((rows, width)) * np.arange(1, width + 1) + shift


def gaussian(mu, deviations):
    return Statistics(np.array(mu, dtype=float), np.diag(np.square(np.array(deviations, dtype=float))))


def test_the_frechet_distance_of_known_gaussians():
    # With diagonal covariances it is the sum of (mu_a - mu_b)^2 + (s_a - s_b)^2.
    a, b = gaussian([0, 3], [1, 2]), gaussian([1, 5], [4, 2.5])
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + 9 + 0.25, rel=1e-12)
    singular = gaussian([0, 3], [1, 0])
    assert frechet_distance(singular, b) == pytest.approx(1 + 4 + 9 + 6.25, rel=1e-7)


def test_the_frechet_distance_is_symmetric_and_zero_for_equal_sets():
    a, b = features(300), features(200, seed=1, shift=0.5)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert abs(frechet_distance(a, a.copy())) < 1e-9 * np.trace(np.cov(a.T))


@pytest.mark.parametrize("shift", [0.0, 1e6])
def test_statistics_are_those_of_numpy_in_any_batches_and_parts(shift):
    x = features(501, shift=shift)
    mu, sigma = x.mean(0), np.cov(x, rowvar=False)
    u = np.finfo(float).eps * len(x)
    parts = []
    for part in np.split(x, [100, 333]):
        total = StatisticsSum()
        for batch in np.array_split(part, 3):
            total.add(torch.from_numpy(batch))
        parts.append(total.moments())
    for found in (statistics_of(x), statistics_of(x, batch_size=7), merged(parts)):
        np.testing.assert_allclose(found.mu, mu, rtol=u, atol=u * abs(shift or 1))
        # The rounding of the inputs themselves, at their shift, is squared into the covariance.
        np.testing.assert_allclose(found.sigma, sigma, rtol=1e-9, atol=u * abs(shift or 1))


def test_the_inception_score_of_known_classes():
    sure = np.eye(4)[np.arange(200) % 4]
    assert inception_score(sure) == pytest.approx(4)
    assert inception_score(np.full((50, 8), 1 / 8)) == pytest.approx(1)
    # The splits are in the order of the images: a split with one class scores 1.
    ordered = np.eye(2)[np.repeat([0, 1], 10)]
    assert inception_score(ordered) == pytest.approx(2)
    assert inception_score(ordered, split_size=10) == pytest.approx(1)


def _mmd_ref(x, y):
    """Return the unbiased MMD^2 with the cubic kernel by explicit loops."""

    def kernel(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    n = len(x)
    same = sum(kernel(s[i], s[j]) for s in (x, y) for i in range(n) for j in range(n) if i != j)
    return same / (n * (n - 1)) - 2 * sum(kernel(a, b) for a in x for b in y) / n**2


def test_the_kernel_distance_is_its_definition():
    x, y = features(12), features(12, seed=1, shift=0.3)
    found = kernel_distance(x, y, subsets=3, subset_size=12)
    assert found.mean == pytest.approx(_mmd_ref(x, y), rel=1e-9)
    assert found.std == pytest.approx(0, abs=1e-9 * abs(found.mean))


def test_the_kernel_distance_is_unbiased():
    values = [kernel_distance(features(60, seed=s), features(60, seed=s + 500), 1).mean for s in range(200)]
    assert abs(np.mean(values)) < 4 * np.std(values) / math.sqrt(len(values))


def _neighbourhoods_ref(a, b, k, inside):
    """Return the four measures by explicit sorting in float64."""

    def radii(x):
        return np.sort(((x[:, None] - x[None]) ** 2).sum(-1), axis=1)[:, k]

    distances = ((a[:, None] - b[None]) ** 2).sum(-1)
    in_reference, in_samples = inside(distances, radii(b)[None]), inside(distances, radii(a)[:, None])
    return (
        in_reference.any(1).mean(), in_samples.any(0).mean(),
        in_reference.sum(1).mean() / k, in_reference.any(0).mean(),
    )  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("k", [1, 3, 7])
def test_neighbourhoods_are_their_definitions(k, device):
    a, b = features(80), features(90, seed=1, shift=1.0)
    expected = _neighbourhoods_ref(a, b, k, np.less_equal)
    given = [torch.from_numpy(x).to(device) for x in (a, b)]
    assert precision_recall(*given, k, half=False) == pytest.approx(expected[:2])
    assert density_coverage(*given, k) == pytest.approx(_neighbourhoods_ref(a, b, k, np.less)[2:])
    assert kernel_distance(*given).mean == pytest.approx(kernel_distance(a, b).mean, rel=1e-9)


def test_strips_and_blocks_change_nothing(monkeypatch):
    a, b = (torch.tensor(features(n, seed=n), dtype=torch.float32) for n in (57, 43))
    whole, radii = neighbourhoods(a, b), neighbour_radii(a, 3, True)
    monkeypatch.setattr(neighbours_file, "BLOCK", 10)
    monkeypatch.setattr(neighbours_file, "_STRIP_BYTES", 4 * 10 * 3)
    parts = neighbourhoods(a, b)
    assert torch.equal(neighbour_radii(a, 3, True), radii)
    for name in ("precision", "recall", "density", "coverage"):
        assert torch.equal(getattr(whole, name), getattr(parts, name))


def test_only_a_block_with_an_overflow_is_computed_in_float32(monkeypatch):
    monkeypatch.setattr(neighbours_file, "BLOCK", 20)
    a = torch.tensor(features(40), dtype=torch.float32)
    a[25] *= 100  # its squared norm doesn't fit into float16
    found = torch.full((40, 40), torch.nan)
    for rows, columns, distances in neighbours_file.distance_strips(a, a, True):
        found[rows, columns] = distances
    half, single = squared_distances(a, a, True), squared_distances(a, a, False)
    assert not half.isfinite().all()
    first = (slice(0, 20), slice(0, 20))
    assert torch.equal(found[first], half[first]) and not torch.equal(half[first], single[first])
    for other in ((slice(20, 40), slice(20, 40)), (slice(0, 20), slice(20, 40))):
        assert torch.equal(found[other], single[other])


def test_distances_that_overflow_only_together_are_computed_in_float32():
    a, b = torch.tensor([[128.5], [128.25]]), torch.tensor([[-128.5], [-128.25]])  # squares of 16512, 16448
    assert not squared_distances(a, b, True).isfinite().any()  # 66049 is above the largest float16, 65504
    ((_, _, found),) = neighbours_file.distance_strips(a, b, True)
    assert torch.equal(found, (a - b.T).square())


@pytest.mark.parametrize("device", DEVICES)
def test_float16_distances_round_every_step(device):
    a, b = (np.random.default_rng(seed).standard_normal((30, 2)).astype(np.float16) for seed in (0, 1))
    # A sum of two terms has no order; products and sums are rounded once, from float32.
    norms = [np.square(x).astype(np.float32).sum(1).astype(np.float16) for x in (a, b)]
    products = (a.astype(np.float32) @ b.astype(np.float32).T).astype(np.float16)
    expected = np.float16(-2) * products + norms[0][:, None] + norms[1][None]
    found = squared_distances(*(torch.from_numpy(x).to(device) for x in (a, b)), True)
    assert np.array_equal(found.cpu().numpy(), np.maximum(expected, 0).astype(np.float32))


def test_an_interval_of_a_share_is_that_of_the_binomial():
    values = torch.zeros(1000)
    values[:300] = 1
    low, high = bootstrap_interval(values)
    half_width = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert low == pytest.approx(0.3 - half_width, abs=0.1 * half_width)
    assert high == pytest.approx(0.3 + half_width, abs=0.1 * half_width)
    assert bootstrap_interval(values) == (low, high)


def test_an_interval_holds_the_neighbourhoods_so_new_sets_vary_more():
    values, widths = [], []
    for seed in range(40):
        a, b = (np.random.default_rng([seed, i]).standard_normal((200, 16)) for i in (0, 1))
        density = neighbourhoods(a, b, 5, half=False).density
        values.append(float(density.mean()))
        widths.append(np.subtract(*bootstrap_interval(density)[::-1]) / 2)
    assert 1.96 * np.std(values) > 1.1 * np.mean(widths)


MEASURES = {
    "frechet": lambda a, b: frechet_distance(a, b),
    "kernel": lambda a, b: kernel_distance(a, b),
    "precision": lambda a, b: precision_recall(a, b),
    "density": lambda a, b: density_coverage(a, b),
}


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
@pytest.mark.parametrize(
    "samples",
    [
        features(1), features(20, width=5), features(20)[0], np.full((20, 6), np.nan), np.zeros((20, 0)),
        features(20).astype(object), "features", None,
    ],
    ids=["one row", "other width", "a vector", "NaN", "no width", "objects", "text", "None"],
)  # fmt: skip
def test_features_that_are_not_allowed(measure, samples):
    with pytest.raises(InvalidArgument):
        measure(samples, features(20))


@pytest.mark.parametrize("k", [0, 20, 1.5, True])
def test_neighbours_that_are_not_allowed(k):
    with pytest.raises(InvalidArgument, match="^k="):
        precision_recall(features(20), features(30), k=k)
