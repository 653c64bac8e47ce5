"""Dynamic thresholding against its formula, its selections against a sort, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from admfast.errors import InvalidArgument, Unavailable
from admfast.ops import TABLES, dynamic_threshold, dynamic_threshold_ref
from tests.ops.cover import laid_out
from tests.ops.tolerance import (
    DEVICES,
    HALF_AND_SINGLE,
    assert_same_formula,
    assert_within,
    bits,
    unmodified,
)

IMPLEMENTATIONS = TABLES["dynamic_threshold"].names()
SHAPES = [(1, 3, 5, 7), (3, 1, 9, 9), (2, 3, 16, 16), (2, 1), (4, 2), (3, 3), (1, 5, 6, 7, 2), (2, 3, 64, 64)]
PERCENTILES = [0.0, 0.25, 0.5, 0.9, 0.995, 1.0]


def given(shape: tuple[int, ...], mean: float = 0.0, seed: int = 0) -> Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + mean


def textbook(x0: Tensor, percentile: float, limit: float = 1.0) -> Tensor:
    """The paper's sentence, image by image, by torch.quantile."""
    images = []
    for image in x0:
        s = max(float(image.abs().flatten().quantile(percentile)), limit)
        images.append(image.clamp(-s, s) / s)
    return torch.stack(images)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("percentile", PERCENTILES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_implementation_is_the_formula(shape, percentile, impl):
    x0 = given(shape)
    assert_same_formula(
        lambda dtype: dynamic_threshold(x0.to(dtype), percentile, impl=impl),
        lambda dtype: textbook(x0.to(dtype), percentile),
        "x0",
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("mean", [0, 100])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE.values(), ids=HALF_AND_SINGLE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_implementation_is_within_tolerance(shape, dtype, mean, impl, device):
    x0 = given(shape, mean).to(dtype)
    truth, reference = dynamic_threshold_ref(x0.double()), dynamic_threshold_ref(x0)
    there = x0.to(device)
    with unmodified(x0=there):
        got = dynamic_threshold(there, impl=impl).cpu()
    assert_within(got, reference, truth, f"mean {mean}")
    assert float(got.abs().max()) <= 1


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "expanded"])
def test_layouts(layout, impl):
    x0 = given((3, 3, 8, 10))
    laid = laid_out(x0, layout)
    got = dynamic_threshold(laid, impl=impl)
    assert torch.equal(got, dynamic_threshold(laid.contiguous(), impl=impl)) and got.shape == x0.shape
    if layout == "channels_last":
        assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_an_image_does_not_depend_on_its_batch_and_small_ones_are_left_alone(impl):
    x0 = torch.stack([given((3, 6, 6), seed=i) * scale for i, scale in enumerate((0.01, 1, 50))])
    together = dynamic_threshold(x0, 0.9, impl=impl)
    for i in range(3):
        assert torch.equal(together[i : i + 1], dynamic_threshold(x0[i : i + 1], 0.9, impl=impl))
    assert torch.equal(together[0], x0[0]), "s is 1 where the image is within 1"
    assert torch.equal(dynamic_threshold(x0, 0.9, limit=1000.0, impl=impl), x0 / 1000)


@pytest.mark.parametrize("percentile", PERCENTILES)
def test_ties_and_constant_images(percentile):
    for x0 in (torch.full((2, 30), -3.0), (given((2, 40)) * 1.5).round(), torch.zeros(1, 7)):
        got = [bits(dynamic_threshold(x0, percentile, impl=impl)) for impl in IMPLEMENTATIONS]
        assert torch.equal(*got)


@pytest.mark.parametrize("percentile", PERCENTILES)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nan_spoils_its_own_image_and_infinity_is_limited(percentile, impl):
    clean = given((3, 50))
    x0 = clean.clone()
    x0[1, 17] = math.nan
    got, expected = (dynamic_threshold(x, percentile, impl=impl) for x in (x0, clean))
    assert got[1].isnan().all() and torch.equal(got[[0, 2]], expected[[0, 2]])
    if percentile < 0.9:
        x0[1, 17] = -math.inf
        got = dynamic_threshold(x0, percentile, impl=impl)
        assert got.isfinite().all() and float(got[1, 17]) == -1


@pytest.mark.parametrize("percentile", [0.5, 0.75, 0.8, 0.9, 1.0])
def test_every_implementation_treats_infinities_alike(percentile):
    x0 = given((2, 5))
    x0[0, :2] = torch.tensor([math.inf, -math.inf])
    first, *others = (dynamic_threshold(x0, percentile, impl=impl) for impl in IMPLEMENTATIONS)
    assert all(torch.equal(bits(first.nan_to_num(7)), bits(other.nan_to_num(7))) for other in others)
    assert first[1].isfinite().all()
    if percentile == 0.5:
        assert first[0].isfinite().all(), "the percentile is the largest finite value"
    if percentile >= 0.75:
        assert first[0, :2].isnan().all()


def test_more_elements_than_torch_s_quantile_takes():
    x0 = given((1, 2**24 + 8))
    with pytest.raises(RuntimeError, match="too large"):
        x0.quantile(0.995)
    limited = (dynamic_threshold(x0).abs() == 1).sum()
    assert int(limited) == 2**24 + 8 - math.ceil(0.995 * (2**24 + 7)), (
        "all above the percentile, and no other"
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nothing_is_a_size(impl):
    for shape in ((0, 3, 4, 4), (2, 3, 0, 4), (2, 0)):
        assert dynamic_threshold(torch.zeros(shape), impl=impl).shape == shape


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("percentile", [0.3, 0.9, 0.995])
def test_differentiates(percentile, impl):
    x0 = given((2, 3, 3, 4)).double().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: dynamic_threshold(x, percentile, impl=impl), x0)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((torch.zeros(()),), "x0.shape="),
        ((torch.zeros(5),), "x0.shape="),
        ((torch.zeros(2, 3, dtype=torch.int64),), "x0.dtype="),
        ((None,), "x0=None"),
        ((torch.zeros(2, 3), None), "percentile=None"),
        ((torch.zeros(2, 3), 0.5, "1"), "limit='1'"),
        ((torch.zeros(2, 3), -0.1), "percentile=-0.1"),
        ((torch.zeros(2, 3), 99.5), "percentile=99.5"),
        ((torch.zeros(2, 3), math.nan), "percentile=nan"),
        ((torch.zeros(2, 3), 0.5, 0.0), "limit=0.0"),
        ((torch.zeros(2, 3), 0.5, math.inf), "limit=inf"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, None])
def test_wrong_arguments_are_named(arguments, name, impl):
    with pytest.raises(InvalidArgument, match=f"^{name}"):
        dynamic_threshold(*arguments, impl=impl)


def test_an_unknown_implementation_is_refused():
    with pytest.raises((InvalidArgument, Unavailable), match="no implementation of dynamic_threshold"):
        dynamic_threshold(torch.zeros(2, 3), impl="sort")
