"""The backward of `group_norm_silu`: the gradient in both sources, and the sums S1, S2 per image and channel.

With x^ = (x - mean) rstd, a = w' rstd and du = act'(u) times the output's gradient at the input's resolution:
S1 = sum du, S2 = sum du x^, and dx = a du - rstd (A + x^ B) where A and B are the means of w' S1 and w' S2
over the elements of the group. There is one read or two passes, as in the forward; u is recomputed from x
each time. The rounding remainder of mean (`low`) enters once per channel, through b, S2 and the offset of dx.
There are no atomics: every sum has one order, so a gradient has the same bits every time.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from admfast.kernels import norm_launch
from admfast.kernels.norm_launch import Call, OneRead, TwoPass
from admfast.kernels.norm_tensors import (
    Geometry,
    affine_arguments,
    channels_last,
    empty,
    empty_float,
    geometry,
    x_bias_arguments,
)
from admfast.kernels.norm_tiles import (
    UNSPECIALISED,
    activation_backward,
    affine,
    group_sum,
    load_output_gradient,
    load_source,
    load_statistics,
    store_source,
)
from torch import Tensor


@triton.jit
def _channel_sums(
    dy_ptr, x_ptr, x2_ptr, mean, a, b, n, begin, end, c, c_mask, P, P_OUT, H, W, C1, C2,
    SILU: tl.constexpr, RESAMPLE: tl.constexpr, DIMS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Return the sums of du and of du (x - mean) of each channel over positions begin..end."""
    s1 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    s2 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(begin, end, BLOCK_P * UNROLL):
        for j in tl.static_range(UNROLL):
            p = start + j * BLOCK_P + tl.arange(0, BLOCK_P)
            x = load_source(x_ptr, x2_ptr, n, p, p < end, c, c_mask, P, C1, C2)
            g = load_output_gradient(dy_ptr, n, p, p < end, c, c_mask, P_OUT, H, W, C1 + C2, RESAMPLE, DIMS)
            du, centred = activation_backward(g, x, mean, a, b, SILU)
            s1 += du
            s2 += du * centred
    return tl.sum(s1, axis=0), tl.sum(s2, axis=0)


@triton.jit
def _group_terms(s1, s2, w, rstd, lane, P, D, SINGLE: tl.constexpr):
    """Return the terms that dx subtracts: rstd A, and rstd^2 B, the factor of x - mean."""
    mean_s1 = group_sum(w * s1, lane, D, SINGLE) / (P * D)
    mean_s2 = group_sum(w * s2, lane, D, SINGLE) / (P * D)
    return rstd * mean_s1, rstd * rstd * mean_s2


@triton.jit
def _apply_tile(
    dy_ptr, dskip_ptr, x_ptr, x2_ptr, dx_ptr, dx2_ptr, mean, a, b, dx_offset, slope, n, p, c, c_mask,
    P, P_OUT, H, W, C1, C2, SILU: tl.constexpr, RESAMPLE: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """Write dx = a du - dx_offset - (x - mean) slope, plus the skip's gradient, at input positions p."""
    C = C1 + C2
    x = load_source(x_ptr, x2_ptr, n, p, p < P, c, c_mask, P, C1, C2)
    g = load_output_gradient(dy_ptr, n, p, p < P, c, c_mask, P_OUT, H, W, C, RESAMPLE, DIMS)
    du, centred = activation_backward(g, x, mean, a, b, SILU)
    dx = du * a[None, :] - centred * slope[None, :] - dx_offset[None, :]
    if dskip_ptr is not None:
        dx += load_output_gradient(dskip_ptr, n, p, p < P, c, c_mask, P_OUT, H, W, C, RESAMPLE, DIMS)
    store_source(dx_ptr, dx2_ptr, dx, n, p, p < P, c, c_mask, P, C1, C2)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _group_norm_silu_bwd_kernel(
    dy_ptr, dskip_ptr, x_ptr, x2_ptr, x_bias_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr,
    mean_ptr, rstd_ptr, dx_ptr, dx2_ptr, s1_ptr, s2_ptr,
    N, P, P_OUT, H, W, C1, C2, G, D, pieces, blocks, x_bias_stride, scale_stride, shift_stride,
    SILU: tl.constexpr, RESAMPLE: tl.constexpr, DIMS: tl.constexpr,
    SINGLE: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Do it all in one read: a program takes all positions of whole groups, `pieces` times ALIGN channels."""
    n = tl.program_id(0) // blocks
    lane = tl.arange(0, BLOCK_C)
    width = pieces * ALIGN  # unless it knows what divides this, the compiler loads and stores one by one
    c = (tl.program_id(0) % blocks) * width + lane
    c_mask = (lane < width) & (c < C1 + C2)
    mean, low, rstd = load_statistics(mean_ptr, rstd_ptr, x_bias_ptr, n, c, c_mask, N, G, D, x_bias_stride)
    w, b = affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, n, c, c_mask, scale_stride, shift_stride)
    a = w * rstd
    s1, s2 = _channel_sums(
        dy_ptr, x_ptr, x2_ptr, mean, a, b - low * a, n, 0, P, c, c_mask, P, P_OUT, H, W, C1, C2,
        SILU, RESAMPLE, DIMS, BLOCK_P, BLOCK_C, UNROLL,
    )  # fmt: skip
    s2 = (s2 - low * s1) * rstd
    if s1_ptr is not None:
        index = n.to(tl.int64) * (C1 + C2) + c
        tl.store(s1_ptr + index, s1, mask=c_mask)
        tl.store(s2_ptr + index, s2, mask=c_mask)
    dx_offset, slope = _group_terms(s1, s2, w, rstd, lane, P, D, SINGLE)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        _apply_tile(
            dy_ptr, dskip_ptr, x_ptr, x2_ptr, dx_ptr, dx2_ptr, mean, a, b - low * a,
            dx_offset - low * slope, slope, n, p, c, c_mask, P, P_OUT, H, W, C1, C2, SILU, RESAMPLE, DIMS,
        )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALISED)
def _group_norm_silu_sums_kernel(
    dy_ptr, x_ptr, x2_ptr, x_bias_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, mean_ptr, rstd_ptr,
    partial_ptr,
    N, P, P_OUT, H, W, C1, C2, G, D, chunk, chunks, blocks, x_bias_stride, scale_stride, shift_stride,
    SILU: tl.constexpr, RESAMPLE: tl.constexpr, DIMS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Compute the sums of du and of du (x - mean) over each chunk of positions: partial [N, chunks, 2, C]."""
    k = (tl.program_id(0) // blocks) % chunks
    n = tl.program_id(0) // blocks // chunks
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < C1 + C2
    mean, low, rstd = load_statistics(mean_ptr, rstd_ptr, x_bias_ptr, n, c, c_mask, N, G, D, x_bias_stride)
    w, b = affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, n, c, c_mask, scale_stride, shift_stride)
    a = w * rstd
    end = tl.minimum(k * chunk + chunk, P)
    s1, s2 = _channel_sums(
        dy_ptr, x_ptr, x2_ptr, mean, a, b - low * a, n, k * chunk, end, c, c_mask,
        P, P_OUT, H, W, C1, C2, SILU, RESAMPLE, DIMS, BLOCK_P, BLOCK_C, UNROLL,
    )  # fmt: skip
    index = (n.to(tl.int64) * chunks + k) * 2 * (C1 + C2) + c
    tl.store(partial_ptr + index, s1, mask=c_mask)
    tl.store(partial_ptr + index + (C1 + C2), s2 - low * s1, mask=c_mask)


@triton.jit(do_not_specialize=[*UNSPECIALISED, "C"])
def _group_norm_silu_merge_bwd_kernel(
    partial_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, rstd_ptr, terms_ptr, s1_ptr, s2_ptr,
    N, P, C, G, D, width, chunks, blocks, scale_stride, shift_stride,
    SINGLE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Add up the chunks: S1, S2 [N, C], if s1_ptr is given, and the terms [2, N, G] that dx subtracts."""
    n = tl.program_id(0) // blocks
    lane = tl.arange(0, BLOCK_C)
    c = (tl.program_id(0) % blocks) * width + lane
    c_mask = (lane < width) & (c < C)
    k = tl.arange(0, BLOCK_K)
    mask = (k < chunks)[:, None] & c_mask[None, :]
    index = ((n.to(tl.int64) * chunks + k) * 2 * C)[:, None] + c[None, :]
    group = n.to(tl.int64) * G + c // D
    rstd = tl.load(rstd_ptr + group, mask=c_mask, other=0.0)
    w, _b = affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, n, c, c_mask, scale_stride, shift_stride)
    s1 = tl.sum(tl.load(partial_ptr + index, mask=mask, other=0.0), axis=0)
    s2 = tl.sum(tl.load(partial_ptr + index + C, mask=mask, other=0.0), axis=0) * rstd
    if s1_ptr is not None:
        tl.store(s1_ptr + n.to(tl.int64) * C + c, s1, mask=c_mask)
        tl.store(s2_ptr + n.to(tl.int64) * C + c, s2, mask=c_mask)
    dx_offset, slope = _group_terms(s1, s2, w, rstd, lane, P, D, SINGLE)
    first = c_mask & (lane % D == 0)
    tl.store(terms_ptr + group, dx_offset, mask=first)
    tl.store(terms_ptr + N.to(tl.int64) * G + group, slope, mask=first)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _group_norm_silu_apply_bwd_kernel(
    dy_ptr, dskip_ptr, x_ptr, x2_ptr, x_bias_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr,
    mean_ptr, rstd_ptr, terms_ptr, dx_ptr, dx2_ptr,
    N, P, P_OUT, H, W, C1, C2, G, D, span, spans, blocks, x_bias_stride, scale_stride, shift_stride,
    SILU: tl.constexpr, RESAMPLE: tl.constexpr, DIMS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Do the elementwise pass: a program takes `span` input positions."""
    # Backwards through the data: the part that the sums read last is still in the cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    n = program // blocks // spans
    c = (program % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < C1 + C2
    first = ((program // blocks) % spans) * span
    mean, low, rstd = load_statistics(mean_ptr, rstd_ptr, x_bias_ptr, n, c, c_mask, N, G, D, x_bias_stride)
    w, b = affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, n, c, c_mask, scale_stride, shift_stride)
    group = n.to(tl.int64) * G + c // D
    dx_offset = tl.load(terms_ptr + group, mask=c_mask, other=0.0)
    slope = tl.load(terms_ptr + N.to(tl.int64) * G + group, mask=c_mask, other=0.0)
    a = w * rstd
    for start in range(first, tl.minimum(first + span, P), BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        _apply_tile(
            dy_ptr, dskip_ptr, x_ptr, x2_ptr, dx_ptr, dx2_ptr, mean, a, b - low * a,
            dx_offset - low * slope, slope, n, p, c, c_mask, P, P_OUT, H, W, C1, C2, SILU, RESAMPLE, DIMS,
        )  # fmt: skip


def plan_bwd(
    dy: Tensor,
    dskip: Tensor | None,
    x: Tensor,
    x2: Tensor | None,
    x_bias: Tensor | None,
    g: Geometry,
    affine: dict[str, Any],
    statistics: dict[str, Tensor],
    silu: bool,
    outputs: dict[str, Tensor | None],
    launch: OneRead | TwoPass,
) -> list[Call]:
    """Return the kernel launches of a backward."""
    sizes, groups = g.sizes, statistics["rstd_ptr"].shape[1]
    channels, depth = g.c1 + g.c2, (g.c1 + g.c2) // groups
    sums = {name: outputs[name] for name in ("s1_ptr", "s2_ptr")}
    gradients = {name: outputs[name] for name in ("dx_ptr", "dx2_ptr")}
    common = dict(dy_ptr=dy, x_ptr=x, x2_ptr=x2, **x_bias_arguments(x_bias), **affine, **statistics, **sizes)
    common |= dict(G=groups, D=depth, SILU=silu, RESAMPLE=g.resample, DIMS=g.dims)
    if isinstance(launch, OneRead):
        blocks = -(-groups // launch.groups)
        block_arguments = dict(**launch.block, **launch.channel_arguments(depth), blocks=blocks)
        arguments = dict(**common, **gradients, **sums, **block_arguments, dskip_ptr=dskip)
        registers = 255 if g.resample == "up" else 128
        return [Call(_group_norm_silu_bwd_kernel, g.n * blocks, arguments, launch.warps, registers)]
    chunks, blocks = launch.chunks(sizes["P"]), -(-channels // launch.block_c)
    partial, terms = empty_float((g.n, chunks, 2, channels), x), empty_float((2, g.n, groups), x)
    sums_arguments = dict(
        **common, **launch.block, partial_ptr=partial, chunk=launch.chunk, chunks=chunks, blocks=blocks
    )
    merge_launch = norm_launch.choose_merge(g.shape(groups, x), chunks)
    merge_arguments = dict(
        **affine, **sums, **merge_launch.block, partial_ptr=partial, terms_ptr=terms, chunks=chunks
    )
    merge_arguments |= dict(
        rstd_ptr=statistics["rstd_ptr"], N=g.n, P=sizes["P"], C=channels, G=groups, D=depth
    )
    merge_arguments |= dict(**merge_launch.channel_arguments(depth), blocks=-(-groups // merge_launch.groups))
    slots = norm_launch.apply_slots(True, 1 if x2 is None else 2, g.resample, silu)
    span_arguments = launch.spans(g.n * blocks, sizes["P"], slots)
    apply_arguments = dict(
        **common, **gradients, **span_arguments, dskip_ptr=dskip, terms_ptr=terms, blocks=blocks
    )
    apply_arguments |= dict(BLOCK_P=launch.apply_p, BLOCK_C=launch.block_c)
    programs = g.n * blocks * span_arguments["spans"]
    registers = 255 if g.resample == "up" else 96 if x2 is None and g.resample is None else 168
    return [
        Call(_group_norm_silu_sums_kernel, g.n * chunks * blocks, sums_arguments, launch.warps),
        Call(
            _group_norm_silu_merge_bwd_kernel,
            g.n * merge_arguments["blocks"],
            merge_arguments,
            merge_launch.warps,
            255,
        ),
        Call(_group_norm_silu_apply_bwd_kernel, programs, apply_arguments, launch.apply_warps, registers),
    ]


def group_norm_silu_bwd(
    dy: Tensor,
    dskip: Tensor | None,
    x: Tensor,
    x2: Tensor | None,
    x_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    silu: bool,
    resample: str | None,
    sums: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Compute the gradient in [x, x2] of `group_norm_silu_fwd`, and S1, S2.

    The formula is in `admfast/ops/norm/grad.py`.

    Args: dy and dskip [N, C, *resampled], any layout (copied unless channels-last); mean [2, N, G] and rstd
    [N, G] as the forward returned them; the others as in the forward. `sums`: return S1 and S2.

    Returns: dx and dx2 (None without x2) with shape and dtype of x and x2, S1 and S2 [N, C] float32 (empty
    unless `sums`). Raises ValueError for another layout or dtype of x, or another shape of dy. Accumulates in
    float32, in a fixed order; never waits for the device.
    """
    g = geometry(x, x2, resample)
    shape = (g.n, g.c1 + g.c2, *g.out_spatial)
    if dy.shape != shape:
        raise ValueError(f"dy.shape={tuple(dy.shape)}: must be {shape}")
    dx, dx2 = empty(tuple(x.shape), x), None if x2 is None else empty(tuple(x2.shape), x)
    s1, s2 = (empty_float((g.n, g.c1 + g.c2), x) for _ in range(2)) if sums else (None, None)
    if not g.empty:
        launch = norm_launch.choose(g.shape(rstd.shape[1], x), backward=True)
        inputs = (channels_last(dy), channels_last(dskip), x, x2, x_bias, g)
        outputs = dict(dx_ptr=dx, dx2_ptr=dx2, s1_ptr=s1, s2_ptr=s2)
        statistics = dict(mean_ptr=mean, rstd_ptr=rstd)
        affine = affine_arguments(weight, bias, scale, shift)
        norm_launch.run(plan_bwd(*inputs, affine, statistics, silu, outputs, launch), x.device)
    elif s1 is not None and s2 is not None:
        s1.zero_()
        s2.zero_()
    empties = (x.new_empty(0, dtype=torch.float32) for _ in range(2))
    return (
        dx,
        dx2,
        *(empty if inputs is None else inputs for inputs, empty in zip((s1, s2), empties, strict=True)),
    )
