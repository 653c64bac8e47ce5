"""Add a convolution's bias and residual by one Triton kernel on a GPU, where torch takes two."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from admfast.ops import launchers
from admfast.ops.layout import is_channels_last
from admfast.ops.transforms import record, recorded, traced


def serves(device: str, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> bool:
    """Tell whether the kernel may follow the convolution of `x`, which is on that kind of device.

    What looks on (a compiler, a transform, a mode) or differentiates forward must see torch's operations.
    """
    return (
        not traced(x, residual)
        and device == "cuda"
        and not (bias is None and residual is None)
        and x.dim() in (4, 5)
        and x.dtype in launchers.DTYPES
        and (residual is None or is_channels_last(residual))
        and torch.autograd.forward_ad._current_level < 0
        and launchers.reason_missing() is None
        and not launchers.interpreted()
    )


def add(y: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """Compute `y + bias + residual` into `y`, an output of a convolution that nobody else holds.

    Differentiable in y and residual any number of times, never in bias.
    """
    if recorded(y, residual):
        result: Tensor = record(ConvEpilogueFn, y, bias, residual)
        return result
    return _launcher()(y, bias, residual)


class ConvEpilogueFn(torch.autograd.Function):
    """`y + bias + residual` in place; no convolution's gradient looks at its output."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        ctx.mark_dirty(y)
        return _launcher()(y, bias, residual)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, Tensor | None]:  # type: ignore[override]
        return dy, None, dy if ctx.needs_input_grad[2] else None


@functools.cache
def _launcher() -> Callable[[Tensor, Tensor | None, Tensor | None], Tensor]:
    """Return the raw launcher; importing it imports triton."""
    return launchers.launcher("conv_epilogue", "conv_epilogue_fwd")
