"""Layers and helpers under the names of the published `nn.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from admfast.diffusion import mean_flat
from admfast.errors import invalid
from admfast.models.convolution import conv_nd
from admfast.models.layers import Norm as GroupNorm32
from admfast.models.layers import timestep_embedding
from admfast.models.layers import zero_parameters as zero_module

__all__ = [
    "GroupNorm32",
    "SiLU",
    "avg_pool_nd",
    "checkpoint",
    "conv_nd",
    "linear",
    "mean_flat",
    "normalization",
    "scale_module",
    "timestep_embedding",
    "update_ema",
    "zero_module",
]

SiLU = nn.SiLU
linear = nn.Linear
_POOLS: dict[int, type[nn.Module]] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


def normalization(channels: int) -> GroupNorm32:
    """Return a group norm of 32 groups and eps 1e-5."""
    return GroupNorm32(channels)


def avg_pool_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """Return torch's average pool for 1, 2 or 3 spatial dimensions."""
    if dims not in _POOLS:
        raise invalid("dims", dims, "1, 2 or 3")
    return _POOLS[dims](*args, **kwargs)


@torch.no_grad()
def update_ema(target_params: Iterable[Tensor], source_params: Iterable[Tensor], rate: float = 0.99) -> None:
    """Set every target to rate * target + (1 - rate) * source, in place."""
    for target, source in zip(target_params, source_params, strict=False):
        target.mul_(rate).add_(source, alpha=1 - rate)


@torch.no_grad()
def scale_module(module: nn.Module, scale: float) -> nn.Module:
    """Multiply all parameters of a module by `scale`, and return it."""
    for parameter in module.parameters():
        parameter.mul_(scale)
    return module


def checkpoint(func: Callable[..., Any], inputs: Sequence[Any], params: Iterable[Tensor], flag: bool) -> Any:
    """Return func(*inputs); if `flag`, its activations are computed again in the backward pass.

    params: ignored; the parameters get their gradients without it.
    """
    return torch_checkpoint(func, *inputs, use_reentrant=False) if flag else func(*inputs)
