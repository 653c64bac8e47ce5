"""The C++ implementation of `group_norm_silu` on a CPU: when it can run, and its raw ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from admfast.ops import native
from admfast.ops.layout import empty_channels_last, is_channels_last


def reason_unsupported(x: Tensor) -> str | None:
    """Return None if the loops can read `x`, else the reason."""
    if x.device.type != "cpu":
        return f"x is on {x.device.type}, this runs on the CPU"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"x is {x.dtype}; float32 or bfloat16"
    return None


def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the raw forward (see `RawNorm`)."""
    x, x2, _x_bias, *affine, options = arguments
    modes = options.groups, options.eps, options.silu
    y, mean, rstd = native.ops().group_norm_silu_fwd(x, x2, *affine, *modes)
    return y, y.new_empty(0), mean, rstd


def backward(
    dy: Tensor, _dskip: None, x: Tensor, x2: Tensor | None, _x_bias: None, *rest: Any
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Run the raw backward (see `RawNorm`); S1 and S2 are always computed."""
    *tensors, options, _sums = rest
    dx, dx2, s1, s2 = native.ops().group_norm_silu_bwd(dy, x, x2, *tensors, options.silu)
    return dx, None if x2 is None else dx2, s1, s2


@native.fake("group_norm_silu_fwd")
def _fwd_fake(
    x: Tensor, x2: Any, weight: Any, bias: Any, scale: Any, shift: Any, groups: int, *_args: Any
) -> tuple[Tensor, ...]:
    channels = x.shape[1] + (0 if x2 is None else x2.shape[1])
    y = _empty_dense([x.shape[0], channels, *x.shape[2:]], x)
    mean, rstd = (x.new_empty((x.shape[0], groups), dtype=torch.float64) for _ in range(2))
    return y, mean, rstd


@native.fake("group_norm_silu_bwd")
def _bwd_fake(dy: Tensor, x: Tensor, x2: Any, *_args: Any) -> tuple[Tensor, ...]:
    dx2 = x.new_empty(0) if x2 is None else _empty_dense(list(x2.shape), x)
    s1, s2 = (x.new_empty(dy.shape[:2], dtype=torch.float32) for _ in range(2))
    return _empty_dense(list(x.shape), x), dx2, s1, s2


def _empty_dense(shape: list[int], like: Tensor) -> Tensor:
    """Return an empty tensor in the layout that the ops use: channels-last if `like` is, else contiguous."""
    if like.is_contiguous() or not is_channels_last(like):
        return like.new_empty(shape)
    return empty_channels_last(shape, like)
