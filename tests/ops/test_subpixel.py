"""Convolutions of doubled images without the doubled image."""

from __future__ import annotations

import pytest
import torch

from admfast.errors import InvalidArgument
from admfast.ops.subpixel import SubpixelConv, doubled_conv_ref, phase_weights
from tests.ops.tolerance import assert_within
from tests.small import randn

SHAPES = {"odd": (1, 3, 5, 7, 4), "one pixel": (2, 4, 1, 1, 3), "even": (2, 32, 8, 8, 32)}


def given(shape: str, dtype=torch.float32):
    n, channels, h, w, out = SHAPES[shape]
    x = randn(n, channels, h, w).contiguous(memory_format=torch.channels_last)
    return tuple(t.to(dtype) for t in (x, randn(out, channels, 3, 3, seed=1), randn(out, seed=2)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_convolution_of_the_doubled_image(shape, dtype, bias):
    x, weight, b = given(shape, dtype)
    b = b if bias else None
    wide = (x.double(), weight.double(), None if b is None else b.double())
    y = SubpixelConv(weight, b)(x)
    # Taps are added up and rounded once more than in the reference.
    assert_within(y, doubled_conv_ref(x, weight, b), doubled_conv_ref(*wide), shape)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_flow_to_the_image_alone(shape):
    x, weight, b = given(shape, torch.float64)
    conv = SubpixelConv(weight, b)
    x.requires_grad_(True)
    assert torch.autograd.gradcheck(conv, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(conv, x, fast_mode=True)
    torch.testing.assert_close(conv(x), doubled_conv_ref(x, weight, b), rtol=1e-12, atol=1e-12)


def test_the_taps_of_each_phase():
    weight = torch.arange(1.0, 10).view(1, 1, 3, 3)  # rows 1 2 3, 4 5 6, 7 8 9
    assert phase_weights(weight).tolist() == [
        [[[1, 5], [11, 28]]],
        [[[3, 3], [24, 15]]],
        [[[5, 16], [7, 17]]],
        [[[12, 9], [15, 9]]],
    ]


def test_new_values_go_into_the_same_memory_and_other_kernels_are_refused():
    x, weight, b = given("even")
    conv = SubpixelConv(weight, b)
    conv(x)
    before = conv.nbytes
    conv.refold(2 * weight, 3 * b)
    assert torch.equal(conv(x), SubpixelConv(2 * weight, 3 * b)(x)) and conv.nbytes == before
    with pytest.raises(InvalidArgument, match=r"weight.shape=\(3, 3, 1, 1\): \[C_out, C_in, 3, 3\]"):
        SubpixelConv(torch.zeros(3, 3, 1, 1), None)
