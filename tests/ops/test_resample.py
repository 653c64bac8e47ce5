"""Tests of doubling and halving against repeated and averaged blocks, in one to three dimensions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from admfast.errors import InvalidArgument
from admfast.ops.resample import avg_pool_down, nearest_up
from tests.ops.cover import laid_out
from tests.ops.tolerance import HALF_AND_SINGLE, assert_same_formula, assert_within, unmodified

SHAPES = [(2, 3, 9), (1, 1, 2), (2, 3, 6, 5), (1, 5, 2, 3), (2, 2, 3, 4, 5), (1, 1, 1, 2, 2)]
LAYOUTS = ["contiguous", "channels_last", "sliced", "expanded"]


def resampled_dims(x: Tensor) -> range:
    return range(3 if x.dim() == 5 else 2, x.dim())


def repeated(x: Tensor) -> Tensor:
    for dim in resampled_dims(x):
        x = x.repeat_interleave(2, dim)
    return x


def block_means(x: Tensor) -> Tensor:
    for dim in resampled_dims(x):
        half = x.shape[dim] // 2
        x = (x.narrow(dim, 0, 2 * half).unflatten(dim, (half, 2))).mean(dim + 1)
    return x


def randn(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE.values(), ids=HALF_AND_SINGLE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_up_repeats_every_element(shape, dtype, layout):
    x = laid_out(randn(shape, dtype), layout)
    with unmodified(x=x):
        up = nearest_up(x)
    assert up.dtype == dtype and torch.equal(up, repeated(x))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE.values(), ids=HALF_AND_SINGLE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_down_is_the_mean_of_blocks(shape, dtype, layout):
    x = laid_out(randn(shape, dtype), layout)
    truth = block_means(x.double())
    with unmodified(x=x):
        down = avg_pool_down(x)
    assert down.dtype == dtype
    assert_within(down, truth.to(dtype), truth, "down")
    if dtype == torch.float32:
        assert_same_formula(lambda d: avg_pool_down(x.to(d)), lambda d: block_means(x.to(d)), "down")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_down_undoes_up(shape):
    x = randn(shape)
    assert torch.equal(avg_pool_down(nearest_up(x)), x)


@pytest.mark.parametrize("function", [nearest_up, avg_pool_down])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_derivatives(function, shape):
    x = randn(shape, torch.float64).requires_grad_(True)
    assert torch.autograd.gradcheck(function, x) and torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("function", [nearest_up, avg_pool_down])
def test_channels_last_stays_and_no_batch_is_a_batch(function):
    x = laid_out(randn((2, 3, 6, 4)), "channels_last")
    assert function(x).is_contiguous(memory_format=torch.channels_last)
    assert function(x[:0]).shape[0] == 0


@pytest.mark.parametrize("function", [nearest_up, avg_pool_down])
@pytest.mark.parametrize("shape", [(2, 3), (1, 2, 2, 2, 2, 2)], ids=str)
def test_other_numbers_of_dimensions_are_refused(function, shape):
    with pytest.raises(InvalidArgument, match="^x.shape="):
        function(randn(shape))


@pytest.mark.parametrize("shape", [(2, 3, 1), (2, 3, 1, 4), (2, 3, 4, 1), (2, 3, 4, 1, 4)], ids=str)
def test_nothing_to_average_is_refused(shape):
    with pytest.raises(InvalidArgument, match="^x.shape="):
        avg_pool_down(randn(shape))
