"""Tests that `ValueSnapshot` notices a change of any element of a small tensor, any row of a large one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from admfast.models.fold.values import LARGEST_COMPARED_WHOLE, ValueSnapshot
from tests.ops.cover import laid_out

LAYOUTS = ("contiguous", "channels_last", "sliced", "expanded")


def poke(tensor: Tensor, index: tuple) -> bool:
    """Add 1 to a part of a tensor without raising its version; tell whether `ValueSnapshot` notices."""
    values = ValueSnapshot([tensor])
    assert values.are_unchanged()
    tensor.data[index] += 1
    return not values.are_unchanged() and not values.were_written()


@pytest.mark.parametrize("element", [0, 1, 2047, LARGEST_COMPARED_WHOLE - 1])
def test_every_element_of_a_small_tensor_is_compared(element):
    assert poke(torch.zeros(LARGEST_COMPARED_WHOLE), (element,))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("row", [0, 1, 100, 319])
def test_every_row_of_a_large_tensor_is_compared(layout, row):
    assert poke(laid_out(torch.zeros(320, 48, 3, 3), layout), (row,))


@pytest.mark.parametrize("shape", [(64, 64, 3, 3), (96, 64, 1, 1), (128, 512), (6, 768, 3, 3), (512, 768)])
def test_every_column_of_the_models_shapes_is_compared(shape):
    weight = torch.zeros(shape)
    assert all(poke(weight, (slice(None), column)) for column in range(shape[1]))


def test_few_elements_of_a_large_tensor_are_compared():
    weight = torch.zeros(512, 512, 3, 3)
    values = ValueSnapshot([weight])
    assert 512 <= values.num_compared < 600
    assert not poke(torch.zeros(64, 64, 3, 3), (0, 0, 0, 0))
    assert ValueSnapshot([torch.zeros(1, 1, 100, 100)]).num_compared


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_values_are_compared_bit_by_bit(dtype):
    held = torch.tensor([float("nan"), 0.0, 1.0], dtype=dtype)
    values = ValueSnapshot([held, torch.ones(5000, dtype=dtype), torch.ones(0), torch.tensor(2.0)])
    assert values.are_unchanged()  # although NaN != NaN
    held.data[1] = -0.0
    assert not values.are_unchanged()


def test_tensors_are_compared_under_modes_and_transforms():
    held = torch.zeros(3)
    values = ValueSnapshot([held])
    with torch.inference_mode():
        assert values.are_unchanged()
    assert torch.func.grad(lambda x: x * values.are_unchanged())(torch.ones(())) == 1
    held.data.add_(1)
    assert torch.func.vmap(lambda x: x * values.are_unchanged())(torch.ones(2)).sum() == 0
