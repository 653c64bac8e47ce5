"""Divergence and likelihood of Gaussians, elementwise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from admfast.errors import invalid


def mean_flat(x: Tensor) -> Tensor:
    """Return the mean over all dimensions but the first: [N, ...] -> [N], in x's dtype. Differentiable."""
    return x.flatten(1).mean(dim=1)


def normal_kl(mean1: Tensor, log_var1: Tensor, mean2: Tensor | float, log_var2: Tensor | float) -> Tensor:
    """Return KL(N(mean1, e^log_var1) || N(mean2, e^log_var2)) elementwise, in nats.

    (log_var2 - log_var1 + e^(log_var1 - log_var2) + (mean1 - mean2)^2 e^-log_var2 - 1) / 2.
    Source: `normal_kl` of the published code.

    All arguments broadcast; the second distribution may be numbers. Result in the tensors' dtype.
    Differentiable.
    """
    # `new_full` writes the number on the device; a tensor made on the host would have to be copied there.
    second = log_var2 if isinstance(log_var2, Tensor) else log_var1.new_full((), log_var2)
    spread = (log_var1 - second).exp()
    shift = (mean1 - mean2) ** 2 * (-second).exp()
    return 0.5 * (second - log_var1 - 1.0 + spread + shift)


def approx_standard_normal_cdf(x: Tensor) -> Tensor:
    """Return (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2, within 2e-4 of the standard normal's cdf.

    Source: `approx_standard_normal_cdf` of the published code.

    Any shape and float dtype. Differentiable.
    """
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: Tensor, *, means: Tensor, log_scales: Tensor) -> Tensor:
    """Return the log probability, in nats, that a Gaussian rounded to 8-bit levels gives x.

    log(F((x + 1/255 - mean) / s) - F((x - 1/255 - mean) / s)), s = e^log_scales, F the approximate cdf; the
    lowest level (x < -0.999) takes the whole lower tail and the highest (x > 0.999) the upper one, so that
    the 256 probabilities sum to 1. A probability below 1e-12 is replaced by 1e-12, and its gradient is 0.
    Source: `discretized_gaussian_log_likelihood` of the published code.

    x: [N, ...], 8-bit levels scaled to [-1, 1]. means, log_scales: the same shape. Differentiable.
    Raises: InvalidArgument for other shapes.
    """
    for name, value in (("means", means), ("log_scales", log_scales)):
        if value.shape != x.shape:
            raise invalid(f"{name}.shape", tuple(value.shape), f"that of x, {tuple(x.shape)}")
    centred = x - means
    inverse_scale = (-log_scales).exp()
    below_upper = approx_standard_normal_cdf(inverse_scale * (centred + 1.0 / 255.0))
    below_lower = approx_standard_normal_cdf(inverse_scale * (centred - 1.0 / 255.0))
    inside = torch.where(x > 0.999, 1.0 - below_lower, below_upper - below_lower)
    return torch.where(x < -0.999, below_upper, inside).clamp(min=1e-12).log()
