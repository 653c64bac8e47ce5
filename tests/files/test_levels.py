"""Tests of the conversion between float and uint8 images: truncation, limits and round trips."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from admfast.files.levels import from_uint8, to_uint8
from tests.small import randn


@pytest.mark.parametrize(
    "value, level",
    [(-1.0, 0), (1.0, 255), (-1.5, 0), (140.0, 255), (0.0, 127), (0.999, 254), (-0.9999, 0), (0.00393, 128)],
)
def test_levels_are_truncated_and_limited(value, level):
    assert to_uint8(torch.full((1, 1, 1, 1), value)).item() == level


@pytest.mark.parametrize("spatial", [(6,), (4, 6), (2, 4, 6)], ids=["1-D", "2-D", "3-D"])
def test_channels_go_last_and_come_back(spatial):
    x = randn(2, 3, *spatial) / 2
    images = to_uint8(x)
    assert images.dtype == torch.uint8 and images.shape == (2, *spatial, 3) and images.is_contiguous()
    back = from_uint8(images)
    assert back.dtype == torch.float32 and back.shape == x.shape and back.is_contiguous()
    inside = x.abs() < 1
    # Truncation loses less than one level of 1 / 127.5.
    assert ((x - back)[inside] >= -1e-6).all() and ((x - back)[inside] < 1 / 127.5 + 1e-6).all()


def test_levels_of_the_published_low_resolution_images():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1)
    expected = levels.numpy().astype(np.float32) / 127.5 - 1
    assert np.array_equal(from_uint8(levels)[:, 0].numpy(), expected[..., 0])
    # float32 rounds a level, so truncation may give the level below, never another.
    assert (to_uint8(from_uint8(levels)).int() - levels.int()).abs().max() <= 1
