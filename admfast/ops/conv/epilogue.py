"""Add a convolution's bias and residual with one Triton kernel on a GPU; torch would run two."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from admfast.ops import channel_sums, launchers
from admfast.ops.layout import is_channels_last
from admfast.ops.transforms import apply_autograd, is_intercepted, needs_autograd


def can_serve(device: str, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> bool:
    """Tell whether the kernel may follow the convolution of `x`, which is on a device of the type `device`.

    A compiler, a transform, a dispatch mode and forward-mode differentiation must see torch's own operations.
    """
    return (
        not is_intercepted(x, residual)
        and device == "cuda"
        and not (bias is None and residual is None)
        and x.dim() in (4, 5)
        and x.dtype in launchers.DTYPES
        and (residual is None or is_channels_last(residual))
        and torch.autograd.forward_ad._current_level < 0
        and launchers.reason_missing() is None
        and not launchers.uses_interpreter()
    )


def add_in_place(y: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """Compute `y + bias + residual` in place in `y`, a convolution's output that nothing else refers to.

    The channels' statistics are attached to the result for the norm that reads it (`ops/channel_sums.py`).
    Differentiable in y and residual any number of times, never in bias.
    """
    sums: list[Any] = []
    if needs_autograd(y, residual):
        result: Tensor = apply_autograd(ConvEpilogueFn, y, bias, residual, sums)
    else:
        result = _launch(y, bias, residual, sums)
    channel_sums.attach(result, sums[0])
    return result


class ConvEpilogueFn(torch.autograd.Function):
    """Autograd of `y + bias + residual`, in place: the gradient of a convolution doesn't need its output."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, y: Tensor, bias: Tensor | None, residual: Tensor | None, sums: list[Any]
    ) -> Tensor:
        ctx.mark_dirty(y)
        return _launch(y, bias, residual, sums)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, Tensor | None, None]:  # type: ignore[override]
        return dy, None, dy if ctx.needs_input_grad[2] else None, None


def _launch(y: Tensor, bias: Tensor | None, residual: Tensor | None, sums: list[Any]) -> Tensor:
    """Launch the kernel, and append the statistics to `sums`."""
    result, new_sums = _launcher()(y, bias, residual)
    sums.append(new_sums)
    return result


@functools.cache
def _launcher() -> Callable[[Tensor, Tensor | None, Tensor | None], tuple[Tensor, Any]]:
    """Return the raw launcher; importing it imports triton."""
    return launchers.launcher("conv_epilogue", "conv_epilogue_sums_fwd")
