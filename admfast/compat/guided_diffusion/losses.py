"""Losses under the names of the published `losses.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from admfast import diffusion
from admfast.diffusion import approx_standard_normal_cdf, discretized_gaussian_log_likelihood
from admfast.errors import invalid

__all__ = ["approx_standard_normal_cdf", "discretized_gaussian_log_likelihood", "normal_kl"]


def normal_kl(
    mean1: Tensor | float, logvar1: Tensor | float, mean2: Tensor | float, logvar2: Tensor | float
) -> Tensor:
    """Return KL(N(mean1, e^logvar1) || N(mean2, e^logvar2)) elementwise, in nats."""
    arguments = (mean1, logvar1, mean2, logvar2)
    tensor = next((value for value in arguments if isinstance(value, Tensor)), None)
    if tensor is None:
        raise invalid("mean1, logvar1, mean2, logvar2", arguments, "at least one tensor")
    mean, log_var = (torch.as_tensor(value).to(tensor) for value in (mean1, logvar1))
    return diffusion.normal_kl(mean, log_var, mean2, logvar2)
