"""Autograd of `group_norm_silu` over any raw forward and backward, and the formula of the gradient.

With x^ = (x - mean) rstd, u = x^ w' + b' where w' = weight (1 + scale), b' = bias (1 + scale) + shift, and
du = act'(u) * (dy brought back to the input's resolution),

    S1[n, c] = sum_p du,   S2[n, c] = sum_p du x^
    dx = rstd (w' du - (1/M) sum_group w' S1 - x^ (1/M) sum_group w' S2)      (M: elements of a group)
    dweight = sum_n (1 + scale) S2,  dbias = sum_n (1 + scale) S1
    dscale = weight S2 + bias S1,    dshift = S1

An implementation computes dx, S1 and S2; the rest is the same for all implementations and is computed here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from admfast.ops.resample import avg_pool_down, nearest_up
from admfast.ops.transforms import is_final_backward

Resample = Literal["up", "down"] | None


@dataclass(frozen=True)
class NormOptions:
    """The arguments of a call that aren't tensors.

    skip: return the resampled input too. dtype: of the output; None: that of x.
    """

    groups: int
    eps: float
    silu: bool
    resample: Resample
    skip: bool
    dtype: torch.dtype | None = None


# forward(x, x2, x_bias, weight, bias, scale, shift, options)
#     -> y, skip (empty without `options.skip`), mean [N, G] ([2, N, G] from Triton), rstd [N, G]
# backward(dy, dskip, x, x2, x_bias, weight, bias, scale, shift, mean, rstd, options, sums)
#     -> dx, dx2 (None without x2), S1, S2 [N, C] float32 (they may be empty without `sums`)
RawForward = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
RawBackward = Callable[..., tuple[Tensor, Tensor | None, Tensor, Tensor]]


@dataclass(frozen=True)
class RawNorm:
    """The raw forward and backward of one implementation."""

    name: str
    forward: RawForward
    backward: RawBackward


RAW_NORMS: dict[str, RawNorm] = {}


def apply_resample(x: Tensor, resample: Resample) -> Tensor:
    """Return `x` doubled, halved or unchanged."""
    return nearest_up(x) if resample == "up" else avg_pool_down(x) if resample == "down" else x


def resample_backward(dy: Tensor, like: Tensor, resample: Resample) -> Tensor:
    """Return the gradient of `apply_resample` in its input, which has the shape of `like`."""
    if resample is None:
        return dy
    resampled_dims = range(3 if dy.dim() == 5 else 2, dy.dim())
    if resample == "up":
        for dim in resampled_dims:
            dy = dy.unflatten(dim, (-1, 2)).sum(dim + 1)
        return dy
    for dim in resampled_dims:
        dy = dy.repeat_interleave(2, dim) / 2
    padding = [size - current for size, current in zip(reversed(like.shape), reversed(dy.shape), strict=True)]
    return F.pad(dy, [value for size in padding for value in (0, size)])


def group_norm_silu_grad_ref(
    dy: Tensor,
    dskip: Tensor | None,
    x: Tensor,
    x2: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    options: NormOptions,
    x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Compute dx, dx2, dweight, dbias, dscale and dshift by this module's formula in plain torch.

    Computes in float32, or in float64 for float64 input. Differentiable: second derivatives are taken of it.
    """
    source = x if x2 is None else torch.cat([x, x2], dim=1)
    wide = torch.promote_types(source.dtype, torch.float32)
    n, c = source.shape[:2]
    groups = options.groups
    spatial = (...,) + (None,) * (source.dim() - 2)
    values = (source.to(wide) if x_bias is None else source + x_bias.to(wide)[spatial]).reshape(n, groups, -1)
    centred = values - values.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + options.eps).rsqrt()
    normalised = (centred * rstd).reshape(source.shape)
    factor, offset = weight.to(wide).expand(n, c), bias.to(wide).expand(n, c)
    if scale is not None and shift is not None:
        factor = factor * (1 + scale.to(wide))
        offset = offset * (1 + scale.to(wide)) + shift.to(wide)
    du = resample_backward(dy.to(wide), source, options.resample)
    if options.silu:
        u = normalised * factor[spatial] + offset[spatial]
        sigmoid = torch.sigmoid(u)
        du = du * (sigmoid * (1 + u * (1 - sigmoid)))
    s1 = du.flatten(2).sum(-1)
    s2 = (du * normalised).flatten(2).sum(-1)

    def group_mean(sums: Tensor) -> Tensor:
        """Return the mean over each group of w' times `sums`, at every element of the group."""
        mean = (factor * sums).reshape(n, groups, -1).sum(-1) / values.shape[-1]
        return mean.repeat_interleave(c // groups, 1)[spatial]

    rstd = rstd.reshape(n, groups).repeat_interleave(c // groups, 1)[spatial]
    dsource = rstd * (factor[spatial] * du - group_mean(s1) - normalised * group_mean(s2))
    if dskip is not None:
        dsource = dsource + resample_backward(dskip.to(wide), source, options.resample)
    dx, dx2 = _split(dsource.to(x.dtype), x, x2)
    return dx, dx2, *parameter_gradients(s1, s2, weight, bias, scale, shift)


def parameter_gradients(
    s1: Tensor, s2: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return dweight, dbias, dscale, dshift from the sums S1, S2 [N, C]."""
    dscale = dshift = None
    if scale is not None and shift is not None:
        dscale = (weight.to(s2.dtype) * s2 + bias.to(s1.dtype) * s1).to(scale.dtype)
        dshift = s1.to(shift.dtype)
        s1, s2 = (1 + scale.to(s1.dtype)) * s1, (1 + scale.to(s2.dtype)) * s2
    return s2.sum(0).to(weight.dtype), s1.sum(0).to(bias.dtype), dscale, dshift


def _split(dsource: Tensor, x: Tensor, x2: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if x2 is None:
        return dsource, None
    dx, dx2 = dsource.split([x.shape[1], x2.shape[1]], dim=1)
    return dx, dx2


class GroupNormSiluFn(torch.autograd.Function):
    """Autograd of the op over a raw implementation; twice differentiable, not in forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        x: Tensor,
        x2: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        x_bias: Tensor | None,
        raw_name: str,
        options: NormOptions,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return RAW_NORMS[raw_name].forward(x, x2, x_bias, weight, bias, scale, shift, options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, x_bias, raw_name, options = inputs
        y, skip, mean, rstd = output
        ctx.save_for_backward(*tensors, mean, rstd, x_bias)
        ctx.raw_name, ctx.options, ctx.shape = raw_name, options, y.shape
        ctx.set_materialize_grads(False)  # mean and rstd have no gradient
        ctx.mark_non_differentiable(mean, rstd, *([] if options.skip else [skip]))

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dskip: Tensor | None, *_: None) -> tuple:  # type: ignore[override]
        if dy is None and dskip is None:
            return (None,) * 9
        saved = ctx.saved_tensors  # read once: with activation checkpointing every read recomputes them
        x = saved[0]
        dy = x.new_zeros(ctx.shape) if dy is None else dy
        sums = any(ctx.needs_input_grad[2:6])
        function = GroupNormSiluGradFn
        backward: Callable[..., tuple] = function.forward if is_final_backward() else function.apply
        gradients = backward(dy, dskip if ctx.options.skip else None, *saved, ctx.raw_name, ctx.options, sums)
        return *gradients, None, None, None


class GroupNormSiluGradFn(torch.autograd.Function):
    """Autograd of the op's backward; its gradient is that of `group_norm_silu_grad_ref`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        dy: Tensor,
        dskip: Tensor | None,
        x: Tensor,
        x2: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        x_bias: Tensor | None,
        raw_name: str,
        options: NormOptions,
        sums: bool,
    ) -> tuple:
        arguments = (dy, dskip, x, x2, x_bias, weight, bias, scale, shift)
        dx, dx2, s1, s2 = RAW_NORMS[raw_name].backward(*arguments, mean, rstd, options, sums)
        if not sums:
            return dx, dx2, None, None, None, None
        return dx, dx2, *parameter_gradients(s1, s2, weight, bias, scale, shift)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, _mean, _rstd, x_bias, raw_name, options, sums = inputs
        ctx.save_for_backward(*tensors, x_bias)
        ctx.raw_name, ctx.options, ctx.sums = raw_name, options, sums

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple:  # type: ignore[override]
        *saved, x_bias = ctx.saved_tensors
        present = [index for index, tensor in enumerate(saved) if tensor is not None]

        def formula(*tensors: Tensor) -> tuple[Any, ...]:
            arguments: list[Any] = [None] * len(saved)
            for index, tensor in zip(present, tensors, strict=True):
                arguments[index] = tensor
            dy, dskip, x, x2, weight, bias, scale, shift = arguments
            tensors = (dy, dskip, x, x2, weight, bias, scale, shift)
            outputs = group_norm_silu_grad_ref(*tensors, ctx.options, x_bias)
            return tuple(
                output for output, gradient in zip(outputs, gradients, strict=True) if gradient is not None
            )

        vjp = torch.func.vjp(formula, *(saved[index] for index in present))[1]
        input_gradients = vjp(tuple(gradient for gradient in gradients if gradient is not None))
        result: list[Tensor | None] = [None] * len(saved)
        for index, value in zip(present, cast(tuple[Tensor, ...], input_gradients), strict=True):
            result[index] = value
        return *result, None, None, None, None, None, None
