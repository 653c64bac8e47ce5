"""Tests of which changes `Values` notices: every element of a small tensor, every row of a large one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from admfast.models.fold.values import WHOLE, Values
from tests.ops.cover import laid_out

LAYOUTS = ("contiguous", "channels_last", "sliced", "expanded")


def poke(tensor: Tensor, index: tuple) -> bool:
    """Add 1 to a part of a tensor without raising its version; tell whether `Values` notices."""
    values = Values([tensor])
    assert values.hold()
    tensor.data[index] += 1
    return not values.hold() and not values.written()


@pytest.mark.parametrize("element", [0, 1, 2047, WHOLE - 1])
def test_every_element_of_a_small_tensor_is_compared(element):
    assert poke(torch.zeros(WHOLE), (element,))


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
    values = Values([weight])
    assert 512 <= values.compared < 600
    assert not poke(torch.zeros(64, 64, 3, 3), (0, 0, 0, 0))
    assert Values([torch.zeros(1, 1, 100, 100)]).compared


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_values_are_compared_bit_by_bit(dtype):
    held = torch.tensor([float("nan"), 0.0, 1.0], dtype=dtype)
    values = Values([held, torch.ones(5000, dtype=dtype), torch.ones(0), torch.tensor(2.0)])
    assert values.hold()  # although NaN != NaN
    held.data[1] = -0.0
    assert not values.hold()


def test_tensors_are_compared_under_modes_and_transforms():
    held = torch.zeros(3)
    values = Values([held])
    with torch.inference_mode():
        assert values.hold()
    assert torch.func.grad(lambda x: x * values.hold())(torch.ones(())) == 1
    held.data.add_(1)
    assert torch.func.vmap(lambda x: x * values.hold())(torch.ones(2)).sum() == 0
