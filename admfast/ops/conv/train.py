"""Convolution with trainable weights and an added residual, differentiable in all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from admfast.errors import invalid
from admfast.ops import native
from admfast.ops.conv.folded import (
    FoldedConv,
    check_bias,
    check_residual,
    conv_ref,
    per_dimension,
    uses_vector_loops,
)
from admfast.ops.conv.forms import CONVOLUTIONS, Direction, winograd_unsupported_for
from admfast.ops.dispatch import Implementation, OpTable
from admfast.ops.layout import empty_channels_last, is_channels_last
from admfast.ops.transforms import (
    apply_autograd,
    has_op_observer,
    in_autocast,
    in_forward_mode,
    in_transform,
    is_final_backward,
    needs_autograd,
)

# With fewer channels on either side, or fewer products, the transforms cost more than they save.
MIN_CHANNELS, MIN_PRODUCTS = 16, 2**19


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    impl: str | None = None,
) -> Tensor:
    """Compute `residual + conv(x, weight) + bias` as torch does: a cross-correlation with zero padding.

    Differentiable any number of times in x, weight, bias and residual. Accumulates in float32 or wider. In
    float32 on a CPU, large enough channels-last 3x3 convolutions, their input gradients and their weights'
    gradients run by Winograd's algorithm, which transforms the weights at every call (for its rounding errors
    see `admfast.ops.conv.winograd`). The choice does not depend on whether a gradient is recorded.

    Args:
        x: [N, C_in, *spatial], one to three spatial dimensions, floating.
        weight: [C_out, C_in, *kernel], dtype and device of `x`.
        bias: [C_out] or None.
        residual: [N, C_out, *out] or None, dtype and device of `x`.
        stride, padding: one number for each spatial dimension, or one for all.
        impl: name of an implementation (see `admfast info`); None: chosen by shape.

    Returns: [N, C_out, *out], dtype of `x`; images are channels-last if `x` is.

    Raises: InvalidArgument for an unknown `impl`, and for shapes, devices and (except under autocast) dtypes
        that don't fit; Unavailable for an `impl` that can't serve the call.
    """
    if weight.dim() != x.dim() or x.dim() - 2 not in CONVOLUTIONS or weight.shape[1] != x.shape[1]:
        allowed = f"[C_out, {x.shape[1] if x.dim() > 1 else 'C_in'}, *kernel], for x {tuple(x.shape)}"
        raise invalid("weight.shape", tuple(weight.shape), allowed)
    _check_dtypes_and_devices(x, weight, bias, residual)
    check_bias(weight, bias)
    dims = x.dim() - 2
    geometry = {
        "stride": per_dimension(stride, dims, "stride", 1),
        "padding": per_dimension(padding, dims, "padding", 0),
    }
    return TABLE.choose(impl, x, weight, **geometry).forward(x, weight, bias, residual, **geometry)


def _check_dtypes_and_devices(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> None:
    """Reject tensors of another dtype or device than x; autocast allows other dtypes and casts them."""
    dtype, device = x.dtype, x.device
    if not dtype.is_floating_point:
        raise invalid("x.dtype", dtype, "a floating dtype")
    for name, t in (("weight", weight), ("bias", bias), ("residual", residual)):
        if t is None:
            continue
        if t.dtype != dtype and not in_autocast(device):
            raise invalid(f"{name}.dtype", t.dtype, f"must be {dtype}, the dtype of x")
        if t.device != device:
            raise invalid(f"{name}.device", str(t.device), f"must be {device}, where x is")


class WinogradFn(torch.autograd.Function):
    """Autograd of the 3x3 convolution by Winograd's algorithm; a recorded backward is torch's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        return native.ops().conv3x3_winograd_once(x, weight, bias, residual, False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        use_winograd = is_final_backward() and not has_op_observer()
        dx, dw, db = _gradients(
            dy, x, weight, _needed_gradients(ctx), use_winograd, stride=(1, 1), padding=(1, 1)
        )
        return dx, dw, db, dy if ctx.needs_input_grad[3] else None


def _gradients(
    dy: Tensor, x: Tensor, weight: Tensor, needed: list[bool], use_winograd: bool, **geometry: tuple[int, ...]
) -> tuple[Tensor | None, ...]:
    """Return the needed gradients of x, weight and bias, by Winograd's algorithm or by torch."""
    if use_winograd:
        ops = native.ops()
        return (
            ops.conv3x3_winograd_once(dy, weight, None, None, True) if needed[0] else None,
            ops.conv3x3_winograd_weight_grad(x, dy) if needed[1] else None,
            dy.sum((0, 2, 3)) if needed[2] else None,
        )
    dims = x.dim() - 2
    return torch.ops.aten.convolution_backward(
        dy, x, weight, weight.shape[:1], *geometry.values(), (1,) * dims, False, (0,) * dims, 1, needed
    )


def _needed_gradients(ctx: Any) -> list[bool]:
    """Return whether the backward pass needs the gradients of x, weight and bias, a Function's first inputs.

    `needs_input_grad` is true for trainable parameters even under `autograd.grad(loss, x)`. The autograd
    engine can tell which nodes it will execute, except for leaves. So `_as_view` puts a view between each
    parameter and the Function.
    """
    needed = list(ctx.needs_input_grad[:3])
    for i in (1, 2):
        if needed[i]:
            needed[i] = torch._C._will_engine_execute_node(ctx.next_functions[i][0])  # type: ignore[attr-defined]
    return needed


def _as_view(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.view_as(parameter)


def run_winograd(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, **_geometry: tuple[int, ...]
) -> Tensor:
    """Convolve by Winograd's F(4x4, 3x3) in C++, with weights transformed at each call (csrc/README.md)."""
    if residual is not None:
        check_residual(residual, (x.shape[0], weight.shape[0], *x.shape[2:]))
    if needs_autograd(x, weight, bias, residual):
        return apply_autograd(WinogradFn, x, _as_view(weight), _as_view(bias), residual)
    return native.ops().conv3x3_winograd_once(x, weight, bias, residual, False)


@native.fake("conv3x3_winograd_once")
def _fake_winograd(x: Tensor, weight: Tensor, _bias: Any, _residual: Any, transposed: bool) -> Tensor:
    return empty_channels_last((x.shape[0], weight.shape[1 if transposed else 0], *x.shape[2:]), x)


@native.fake("conv3x3_winograd_weight_grad")
def _fake_winograd_weight_grad(x: Tensor, dy: Tensor) -> Tensor:
    return x.new_empty((dy.shape[1], x.shape[1], 3, 3))


def folded_conv(
    conv: FoldedConv,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    x2: Tensor | None = None,
) -> Tensor:
    """Compute `conv(x, residual, x2)`, differentiable in the weight and bias that it was folded from.

    weight, bias: `conv.weight` and `conv.bias`, or views of them. The input's gradient uses a folded form too
    where it can, but not if it is itself differentiated. The weights' gradient is computed only if the
    backward pass needs it, so not in `torch.autograd.grad(loss, x)`. Not for use under torch.func and
    torch.compile.
    """
    weight, bias = (
        weight.view_as(weight),
        None if bias is None else bias.view_as(bias),
    )  # see `_needed_gradients`
    if len(conv.directions) == 1:
        x = x if x2 is None else torch.cat([x, x2], dim=1)
        return apply_autograd(FoldedConvFn, x, weight, bias, residual, conv, 0)
    if x2 is None:
        raise invalid("x2", None, "a tensor: the weights are split for two sources")
    split = conv.options.split
    y = apply_autograd(FoldedConvFn, x, weight[:, :split], bias, residual, conv, 0)
    return apply_autograd(FoldedConvFn, x2, weight[:, split:], None, y, conv, 1)


class FoldedConvFn(torch.autograd.Function):
    """Autograd of one source of a folded convolution; `weight`: the trainable weights of that source."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        conv: FoldedConv,
        source: int,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.direction = conv.directions[source]
        ctx.refold_count = ctx.direction.refold_count
        return conv.conv_source(source, x, residual)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        direction: Direction = ctx.direction
        needed, dx = _needed_gradients(ctx), None
        is_final = is_final_backward() and not has_op_observer()
        # A form renewed since then would give the gradient for its new weights, not for those saved here.
        form_is_current = direction.refold_count == ctx.refold_count
        if needed[0] and is_final and form_is_current and set(direction.stride) == {1}:
            transpose = direction.transposed()
            dx = transpose.run(transpose, dy, None, None)
            needed[0] = False
        gradients: tuple[Tensor | None, ...] = (None, None, None)
        if any(needed):
            output_order = direction.options.rows
            dy_in_weight_order = (
                dy if output_order is None else dy[:, torch.tensor(output_order, device=dy.device).argsort()]
            )
            geometry = {"stride": direction.stride, "padding": direction.padding}
            use_winograd = is_final and TABLE.choose(None, x, weight, **geometry).name == "winograd"
            gradients = _gradients(
                dy_in_weight_order, x, weight.to(x.dtype), needed, use_winograd, **geometry
            )
        _, dw, db = gradients
        return (
            dx if dx is not None else gradients[0],
            dw,
            db,
            dy if ctx.needs_input_grad[3] else None,
            None,
            None,
        )


def winograd_unsupported(x: Tensor, weight: Tensor, **geometry: tuple[int, ...]) -> str | None:
    """Return why Winograd's convolution can't serve a call; None if it can."""
    if not is_channels_last(x):
        return "x is not channels-last"
    if in_transform() or torch.compiler.is_compiling() or in_forward_mode():
        return "not under torch.func or torch.compile, and not for forward-mode derivatives"
    return winograd_unsupported_for(tuple(weight.shape[2:]), x=x, **geometry)


def run_library(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, **geometry: tuple[int, ...]
) -> Tensor:
    """Convolve by torch's own convolution."""
    if weight.requires_grad and weight.dim() > 3 and weight.is_contiguous():
        # The library gives the weights' gradient the layout of the images. Through a view it gets that of the
        # weights.
        weight = weight.flatten(1).unflatten(1, weight.shape[1:])
    y = CONVOLUTIONS[x.dim() - 2](x, weight, bias, **geometry)
    if residual is None:
        return y
    check_residual(residual, y.shape)
    return residual + y


def find_fastest(x: Tensor, weight: Tensor, **_geometry: tuple[int, ...]) -> str:
    """Return the name of the implementation that was measured to be the fastest for a call.

    Milliseconds on two threads of an EPYC with AVX-512, float32, channels-last, library / Winograd including
    the weights' transform:

        channels, side, batch       forward    input gradient  weights' gradient
         128 ->  128, 64, 4        21 / 8.0        21 / 8.1         25 / 8.5
         256 ->  256, 32, 4        22 / 8.9        22 / 8.3         24 / 10.5
         384 ->  384, 16, 4        12 / 6.1        13 / 5.9         14 / 5.4
         512 ->  512,  8, 4       7.4 / 4.0       7.3 / 4.2        7.6 / 3.7
        1024 ->  512,  8, 4        14 / 8.0        14 / 7.9         36 / 6.9
          32 ->   32, 32, 32      2.9 / 1.6       3.0 / 1.5        3.2 / 1.4
          64 ->   64, 16, 32      2.6 / 1.2       2.7 / 1.2        3.1 / 1.1
         128 ->  128,  8, 32      2.6 / 1.5       2.6 / 1.4        3.1 / 1.7
           3 ->  128, 64, 4       0.7 / 0.6       3.0 / 2.7        0.7 / 1.6
         128 ->    6, 64, 4       3.1 / 2.7       1.2 / 1.1        3.1 / 2.7
           1 ->   32, 32, 32      0.4 / 0.8       3.2 / 2.8        0.4 / 1.3
         512 ->  512,  8, 1       4.5 / 2.5       4.3 / 2.3         14 / 1.9
          64 ->   64,  8, 4      0.28 / 0.21     0.32 / 0.21      0.34 / 0.21
          32 ->   32,  8, 4      0.16 / 0.19     0.17 / 0.19      0.19 / 0.15
          16 ->   64, 16, 4      0.23 / 0.25     0.25 / 0.34      0.27 / 0.21
          64 ->   64,  5, 8      0.28 / 0.31     0.34 / 0.30      0.35 / 0.27
    """
    if x.dim() != 4 or has_op_observer():
        return "library"
    n, _, height, width = x.shape
    c_out, c_in = weight.shape[:2]
    tiles_are_filled = n * height * width >= 8 * n * -(-height // 4) * -(-width // 4)
    winograd_pays = min(c_in, c_out) >= MIN_CHANNELS and n * height * width * c_in * c_out >= MIN_PRODUCTS
    if not (tiles_are_filled and winograd_pays) or in_autocast(x.device) or not uses_vector_loops():
        return "library"
    return "winograd"


TABLE = OpTable(
    "conv_train",
    [
        Implementation("library", run_library),
        Implementation("winograd", run_winograd, native.reason_missing, winograd_unsupported),
        Implementation("reference", conv_ref),
    ],
    prefer=find_fastest,
)
