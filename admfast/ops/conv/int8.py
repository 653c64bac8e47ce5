"""8-bit 3x3 convolutions: how weights and inputs are rounded, and the reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_STEP = (
    2.0**-100
)  # between levels, so that its reciprocal is finite; also in csrc/conv_direct_ops.cpp
MAX_TERMS = 2**31 // (255 * 127)  # of a sum in 32 bits


def quantized_weights(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return q and s with weight ~ s q: q = round(weight / s), s = max |weight| / 127 of each output channel.

    weight: [C_out, C_in, *kernel]. Returns q of the same shape and s [C_out], both float32; q has whole
    numbers from -127 to 127.
    """
    weight32 = weight.float()
    scale = weight32.flatten(1).abs().amax(1) / 127
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    per_channel = scale.view(-1, *(1,) * (weight.dim() - 1))
    return (weight32 / per_channel).round().clamp(-127, 127), scale


def quantized_inputs(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return q and s with x ~ s q, for each image of x [N, C, H, W].

    The levels q + z are 0 to 255, in equal steps from the smallest to the largest number of the image and 0:
    s = (most - least) / 255, z = round(-least / s), q + z = clamp(round(x / s) + z, 0, 255). Returns q of the
    shape of x, whole numbers, and s [N, 1, 1, 1], at least SMALLEST_STEP, both float32. Both are NaN for an
    image with NaN or infinity.
    """
    x32 = x.float()
    image_dims = (1, 2, 3)
    least = x32.amin(image_dims, keepdim=True).clamp(max=0).double()
    most = x32.amax(image_dims, keepdim=True).clamp(min=0).double()
    step = ((most - least) / 255).float()
    step = torch.where(step < SMALLEST_STEP, SMALLEST_STEP, step)
    zero = (-least / step).round().float()
    level = ((x32 * (1 / step)).round() + zero).clamp(0, 255)
    return level - zero, torch.where(step.isfinite(), step, torch.nan)


def conv_int8_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Convolve the rounded numbers of `quantized_inputs` and `quantized_weights` exactly, in float64.

    3x3, stride 1, padding 1. Adds bias [C_out] and residual [N, C_out, H, W]; returns the dtype of x.
    """
    (q, scale), (w, weight_scale) = quantized_inputs(x), quantized_weights(weight)
    y = F.conv2d(q.double(), w.double(), padding=1) * (scale.double() * weight_scale.double().view(-1, 1, 1))
    if bias is not None:
        y = y + bias.double().view(-1, 1, 1)
    return (y if residual is None else y + residual.double()).to(x.dtype)
