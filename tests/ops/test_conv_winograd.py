"""Tests of Winograd's matrices: exact correlation, exact in float32, small growth of rounding errors."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from admfast.ops import native
from admfast.ops.conv import winograd
from admfast.ops.conv.winograd import (
    amplification,
    gradient_amplification,
    matrices,
    winograd_weights_ref,
)
from tests.ops.cover import laid_out

needs_cpp = pytest.mark.skipif(native.reason_missing() is not None, reason=f"{native.reason_missing()}")


def applied(matrix, values):
    return [sum(a * v for a, v in zip(row, values, strict=True)) for row in matrix]


def test_the_products_make_the_correlation_exactly():
    output, inputs, weights = matrices()
    d = [Fraction(n, 7) for n in (3, -1, 4, 1, -5, 9)]
    g = [Fraction(n, 5) for n in (2, -6, 5)]
    products = [a * b for a, b in zip(applied(weights, g), applied(inputs, d), strict=True)]
    assert applied(output, products) == [sum(g[k] * d[j + k] for k in range(3)) for j in range(4)]


def test_the_transforms_of_images_are_exact_in_float32():
    output, inputs, _ = matrices()
    for value in (v for matrix in (output, inputs) for row in matrix for v in row):
        assert Fraction(float(torch.tensor(float(value), dtype=torch.float32))) == value


def grown(monkeypatch, *points):
    with monkeypatch.context() as patched:
        patched.setattr(winograd, "POINTS", tuple(Fraction(p) for p in points))
        matrices.cache_clear()
        found = amplification()
    matrices.cache_clear()
    return found


def test_the_points_grow_errors_less_than_the_usual_ones(monkeypatch):
    worst, average = amplification()
    assert (worst, average) == pytest.approx((8.77, 5.14), abs=0.01)
    assert grown(monkeypatch, 0, 1, -1, 2, -2) == pytest.approx((31.4, 10.8), abs=0.05)
    quarters = [Fraction(k, 4) for k in range(1, 13)]
    others = [grown(monkeypatch, 0, a, -a, b, -b) for a in quarters for b in quarters if a < b]
    assert min(other[1] for other in others) == average
    assert amplification() == (worst, average)


def test_the_growth_is_that_of_random_terms():
    # For independent normal inputs the result has variance 3, and its terms that of `amplification`.
    generator = torch.Generator().manual_seed(0)
    output, inputs, weights = (torch.tensor([[float(v) for v in row] for row in m]) for m in matrices())
    d, g = torch.randn(6, 20000, generator=generator), torch.randn(3, 20000, generator=generator)
    terms = (weights @ g) * (inputs @ d)
    growth = (output.square() @ terms.square()).mean(1) / 3
    worst, average = amplification()
    assert float(growth.max()) == pytest.approx(worst, rel=0.05)
    assert float(growth.mean()) == pytest.approx(average, rel=0.05)


def test_the_transposed_products_make_the_weights_gradient_exactly():
    output, inputs, weights = matrices()
    d = [Fraction(n, 7) for n in (3, -1, 4, 1, -5, 9)]
    dy = [Fraction(n, 5) for n in (2, -6, 5, 3)]
    points = applied(list(zip(*output, strict=True)), dy)
    products = [a * b for a, b in zip(points, applied(inputs, d), strict=True)]
    wanted = [sum(dy[j] * d[j + k] for j in range(4)) for k in range(3)]
    assert applied(list(zip(*weights, strict=True)), products) == wanted


def test_the_growth_of_the_gradient_is_that_of_random_terms():
    generator = torch.Generator().manual_seed(0)
    output, inputs, weights = (torch.tensor([[float(v) for v in row] for row in m]) for m in matrices())
    d, dy = torch.randn(6, 20000, generator=generator), torch.randn(4, 20000, generator=generator)
    terms = (output.t() @ dy) * (inputs @ d)
    growth = (weights.t().square() @ terms.square()).mean(1) / 4
    worst, average = gradient_amplification()
    assert float(growth.max()) == pytest.approx(worst, rel=0.05)
    assert float(growth.mean()) == pytest.approx(average, rel=0.05)


@needs_cpp
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(1, 1), (32, 3), (33, 16), (6, 40), (96, 70)], ids=str)
def test_the_compiled_weights_are_the_reference_s(shape, layout, transposed):
    weight = torch.randn(*shape, 3, 3, generator=torch.Generator().manual_seed(0))
    given = laid_out(weight, layout)
    u = torch.ops.admfast.winograd_weights(given, transposed)
    weight = weight.flip(2, 3).transpose(0, 1) if transposed else weight
    shape = weight.shape[:2]
    reference = winograd_weights_ref(weight)
    assert u.shape == reference.shape == (-(-shape[0] // 32), 36, shape[1], 32)
    # Both round a float64 value once: they differ only if it is almost halfway between two floats.
    assert float((u - reference).abs().max()) <= torch.finfo(torch.float32).eps * float(reference.abs().max())
    assert float((u != reference).float().mean()) < 1e-3
    full = shape[0] % 32
    assert full == 0 or not u[-1, :, :, full:].any(), "the last panel must be padded with zeros"


@needs_cpp
@pytest.mark.parametrize(
    ("changes", "name"),
    [
        (dict(weight=torch.ones(2, 2, 3, 3, dtype=torch.float64)), "weight is Double"),
        (dict(weight=torch.ones(2, 2, 3, 2)), "weight must be"),
        (dict(weight=torch.ones(2, 3, 3)), "weight must be"),
        (dict(weight=torch.ones(0, 2, 3, 3)), "weight must be"),
    ],
    ids=str,
)
def test_the_compiled_weights_refuse_what_does_not_fit(changes, name):
    call = dict(weight=torch.ones(2, 2, 3, 3), transposed=False)
    with pytest.raises(RuntimeError, match=f"^winograd_weights: {name}"):
        torch.ops.admfast.winograd_weights(**(call | changes))
