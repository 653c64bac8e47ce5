"""The forward of `group_norm_silu`: GroupNorm, affine, scale, shift, SiLU, resampling of channels-last data.

`norm_launch.choose` chooses one of two ways. Two passes: `stats` computes mean and squared deviations of
every channel over chunks of positions, `merge` combines them into mean and rstd of the groups, and `apply` is
elementwise. One read: a program does all three for whole groups of an image, so few that its second read
finds them in the cache. Squares are always summed about a mean of the data itself, in float32. The mean of a
group is kept as a sum of two float32: the rounded mean and its rounding remainder (`low`).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from admfast.kernels import norm_launch
from admfast.kernels.norm_launch import Call, OneRead, TwoPass
from admfast.kernels.norm_tensors import (
    ChannelSums,
    Geometry,
    affine_arguments,
    empty,
    empty_float,
    geometry,
    x_bias_arguments,
)
from admfast.kernels.norm_tiles import (
    UNSPECIALISED,
    activate,
    affine,
    first_copy_position,
    first_pooled_position,
    group_sum,
    load_moments,
    load_source,
    load_statistics,
    load_x_bias,
    moments,
    store_dense,
    store_moments,
    store_statistics,
    subtract_x_bias,
    two_sum,
)
from torch import Tensor


@triton.jit
def _store_copies(
    y_ptr, value, n, p, p_mask, c, c_mask, P_OUT, W, C, RESAMPLE: tl.constexpr, DIMS: tl.constexpr
):
    """Write a tile to its own positions, or each element to its four (in 1-D two) of the doubled output."""
    if RESAMPLE == "up":
        first = first_copy_position(p, W, DIMS)
        for i in tl.static_range(DIMS):
            store_dense(y_ptr, value, n, first + i * 2 * W, p_mask, c, c_mask, P_OUT, C)
            store_dense(y_ptr, value, n, first + i * 2 * W + 1, p_mask, c, c_mask, P_OUT, C)
    else:
        store_dense(y_ptr, value, n, p, p_mask, c, c_mask, P_OUT, C)


@triton.jit
def _store_averages(
    x_ptr, x2_ptr, y_ptr, skip_ptr, mean, a, b, n, q, c, c_mask, P, P_OUT, H, W, C1, C2,
    SILU: tl.constexpr, DIMS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write positions q of the halved output and, if skip_ptr is given, of the halved input."""
    p_mask = q < P_OUT
    first = first_pooled_position(q, H, W, DIMS)
    y = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    skip = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for i in tl.static_range(DIMS):
        for j in tl.static_range(2):
            x = load_source(x_ptr, x2_ptr, n, first + i * W + j, p_mask, c, c_mask, P, C1, C2)
            y += activate(x, mean, a, b, SILU)
            skip += x
    store_dense(y_ptr, y * (0.5 / DIMS), n, q, p_mask, c, c_mask, P_OUT, C1 + C2)
    if skip_ptr is not None:
        store_dense(skip_ptr, skip * (0.5 / DIMS), n, q, p_mask, c, c_mask, P_OUT, C1 + C2)


@triton.jit
def _apply_tile(
    x_ptr, x2_ptr, y_ptr, skip_ptr, mean, a, b, n, p, c, c_mask, P, P_OUT, H, W, C1, C2,
    SILU: tl.constexpr, RESAMPLE: tl.constexpr, DIMS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Do the elementwise part at input positions p; for "down", at output positions p."""
    if RESAMPLE == "down":
        _store_averages(
            x_ptr, x2_ptr, y_ptr, skip_ptr, mean, a, b, n, p, c, c_mask,
            P, P_OUT, H, W, C1, C2, SILU, DIMS, BLOCK_P, BLOCK_C,
        )  # fmt: skip
    else:
        x = load_source(x_ptr, x2_ptr, n, p, p < P, c, c_mask, P, C1, C2)
        y = activate(x, mean, a, b, SILU)
        _store_copies(y_ptr, y, n, p, p < P, c, c_mask, P_OUT, W, C1 + C2, RESAMPLE, DIMS)
        if skip_ptr is not None:
            _store_copies(skip_ptr, x, n, p, p < P, c, c_mask, P_OUT, W, C1 + C2, RESAMPLE, DIMS)


@triton.jit
def _channel_statistics(
    x_ptr, x2_ptr, x_bias_ptr, n, begin, end, c, c_mask, P, C1, C2, x_bias_stride,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Return per channel over positions begin..end the mean, as two terms, and the squared deviations."""
    p = begin + tl.arange(0, BLOCK_P)
    x = load_source(x_ptr, x2_ptr, n, p, p < end, c, c_mask, P, C1, C2)
    # Deviations are taken about the mean of the first tile. A program has few tiles, and their number bounds
    # the cancellation.
    pivot = tl.sum(x, axis=0) / tl.minimum(end - begin, BLOCK_P)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(begin, end, BLOCK_P * UNROLL):
        for j in tl.static_range(UNROLL):
            p = start + j * BLOCK_P + tl.arange(0, BLOCK_P)
            x = load_source(x_ptr, x2_ptr, n, p, p < end, c, c_mask, P, C1, C2)
            centred = tl.where((p < end)[:, None], x - pivot[None, :], 0.0)
            total += centred
            squares += centred * centred
    pivot, mean_offset, deviations = moments(pivot, total, squares, end - begin)
    if x_bias_ptr is not None:
        pivot, remainder = two_sum(pivot, load_x_bias(x_bias_ptr, n, c, c_mask, x_bias_stride))
        mean_offset += remainder
    return pivot, mean_offset, deviations


@triton.jit
def _group_statistics(
    pivot, mean_offset, deviations, sizes, mask, lane, P, D, EPS: tl.constexpr, SINGLE: tl.constexpr
):
    """Merge [parts, channels] into mean, its rounding remainder, and rstd of each channel's group.

    This is Chan et al. 1983 over all parts at once: first a rough mean, then everything about that mean.
    """
    mean = group_sum(tl.sum(sizes * (pivot + mean_offset), axis=0), lane, D, SINGLE) / (P * D)
    centred = tl.where(mask, (pivot - mean[None, :]) + mean_offset, 0.0)
    low = group_sum(tl.sum(sizes * centred, axis=0), lane, D, SINGLE) / (P * D)
    squares = group_sum(tl.sum(deviations + sizes * centred * centred, axis=0), lane, D, SINGLE)
    return mean, low, tl.rsqrt(squares / (P * D) - low * low + EPS)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _group_norm_silu_fwd_kernel(
    x_ptr, x2_ptr, x_bias_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, mean_ptr, rstd_ptr,
    y_ptr, skip_ptr,
    N, P, P_OUT, H, W, C1, C2, G, D, pieces, blocks, x_bias_stride, scale_stride, shift_stride,
    EPS: tl.constexpr, SILU: tl.constexpr, RESAMPLE: tl.constexpr, DIMS: tl.constexpr,
    SINGLE: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Do it all in one read: a program takes all positions of whole groups, `pieces` times ALIGN channels."""
    n = tl.program_id(0) // blocks
    lane = tl.arange(0, BLOCK_C)
    width = pieces * ALIGN  # unless it knows what divides this, the compiler loads and stores one by one
    c = (tl.program_id(0) % blocks) * width + lane
    c_mask = (lane < width) & (c < C1 + C2)
    pivot, mean_offset, deviations = _channel_statistics(
        x_ptr, x2_ptr, x_bias_ptr, n, 0, P, c, c_mask, P, C1, C2, x_bias_stride, BLOCK_P, BLOCK_C, UNROLL
    )
    mean, low, rstd = _group_statistics(
        pivot[None, :], mean_offset[None, :], deviations[None, :], P, c_mask[None, :], lane, P, D, EPS, SINGLE
    )
    store_statistics(mean_ptr, rstd_ptr, mean, low, rstd, n, c, lane, c_mask, N, G, D)
    mean, low = subtract_x_bias(mean, low, x_bias_ptr, n, c, c_mask, x_bias_stride)
    a, b = affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, n, c, c_mask, scale_stride, shift_stride)
    a = a * rstd
    b = b - low * a
    # This read finds the data in the cache. Resampling needs several addresses per element, so its tile is
    # smaller.
    TILE: tl.constexpr = BLOCK_P * 2 if RESAMPLE is None else BLOCK_P
    for start in range(0, P_OUT if RESAMPLE == "down" else P, TILE):
        p = start + tl.arange(0, TILE)
        _apply_tile(
            x_ptr, x2_ptr, y_ptr, skip_ptr, mean, a, b, n, p, c, c_mask, P, P_OUT, H, W, C1, C2,
            SILU, RESAMPLE, DIMS, TILE, BLOCK_C,
        )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALISED)
def _group_norm_silu_stats_kernel(
    x_ptr, x2_ptr, x_bias_ptr, partial_ptr, P, C1, C2, chunk, chunks, blocks, x_bias_stride,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Compute per channel and chunk the mean, as two terms, and squared deviations: [N, chunks, 3, C]."""
    k = (tl.program_id(0) // blocks) % chunks
    n = tl.program_id(0) // blocks // chunks
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < C1 + C2
    end = tl.minimum(k * chunk + chunk, P)
    pivot, mean_offset, deviations = _channel_statistics(
        x_ptr, x2_ptr, x_bias_ptr, n, k * chunk, end, c, c_mask, P, C1, C2, x_bias_stride,
        BLOCK_P, BLOCK_C, UNROLL,
    )  # fmt: skip
    store_moments(partial_ptr, pivot, mean_offset, deviations, n, k, c, c_mask, chunks, C1 + C2)


@triton.jit(do_not_specialize=[*UNSPECIALISED, "C1", "C2"])
def _group_norm_silu_merge_fwd_kernel(
    partial_ptr, partial2_ptr, mean_ptr, rstd_ptr,
    N, P, C1, C2, G, D, width, chunk, chunks, chunk2, chunks2, blocks,
    EPS: tl.constexpr, SINGLE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Merge the chunks and channels of whole groups into mean, its rounding remainder, and rstd.

    The first C1 channels are those of partial_ptr, the others those of partial2_ptr.
    """
    n = tl.program_id(0) // blocks
    lane = tl.arange(0, BLOCK_C)
    c = (tl.program_id(0) % blocks) * width + lane
    c_mask = (lane < width) & (c < C1 + C2)
    k = tl.arange(0, BLOCK_K)
    pivot, mean_offset, deviations, sizes = load_moments(
        partial_ptr, n, k, c, c_mask & (c < C1), P, C1, chunk, chunks
    )
    if partial2_ptr is not None:
        pivot2, mean_offset2, deviations2, sizes2 = load_moments(
            partial2_ptr, n, k, c - C1, c_mask & (c >= C1), P, C2, chunk2, chunks2
        )
        pivot, mean_offset = pivot + pivot2, mean_offset + mean_offset2
        deviations, sizes = deviations + deviations2, sizes + sizes2
    mean, low, rstd = _group_statistics(
        pivot, mean_offset, deviations, sizes, sizes > 0, lane, P, D, EPS, SINGLE
    )
    store_statistics(mean_ptr, rstd_ptr, mean, low, rstd, n, c, lane, c_mask, N, G, D)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _group_norm_silu_apply_fwd_kernel(
    x_ptr, x2_ptr, x_bias_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, mean_ptr, rstd_ptr,
    y_ptr, skip_ptr,
    N, P, P_OUT, H, W, C1, C2, G, D, span, spans, blocks, x_bias_stride, scale_stride, shift_stride,
    SILU: tl.constexpr, RESAMPLE: tl.constexpr, DIMS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Do the elementwise pass: a program takes `span` input positions; for "down", output positions."""
    # Backwards through the data: the part that the statistics read last is still in the cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    n = program // blocks // spans
    c = (program % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < C1 + C2
    first = ((program // blocks) % spans) * span
    mean, low, rstd = load_statistics(mean_ptr, rstd_ptr, x_bias_ptr, n, c, c_mask, N, G, D, x_bias_stride)
    a, b = affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, n, c, c_mask, scale_stride, shift_stride)
    a = a * rstd
    b = b - low * a
    for start in range(first, tl.minimum(first + span, P_OUT if RESAMPLE == "down" else P), BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        _apply_tile(
            x_ptr, x2_ptr, y_ptr, skip_ptr, mean, a, b, n, p, c, c_mask,
            P, P_OUT, H, W, C1, C2, SILU, RESAMPLE, DIMS, BLOCK_P, BLOCK_C,
        )  # fmt: skip


def plan_fwd(
    x: Tensor,
    x2: Tensor | None,
    x_bias: Tensor | None,
    g: Geometry,
    affine: dict[str, Any],
    groups: int,
    eps: float,
    silu: bool,
    outputs: dict[str, Tensor | None],
    launch: OneRead | TwoPass,
    sums: tuple[ChannelSums, ...] = (),
) -> list[Call]:
    """Return the kernel launches of a forward; sums: the statistics of each source, if all have them."""
    sizes = g.sizes
    channels, depth = g.c1 + g.c2, (g.c1 + g.c2) // groups
    modes = dict(SILU=silu, RESAMPLE=g.resample, DIMS=g.dims)
    sources = dict(x_ptr=x, x2_ptr=x2, **x_bias_arguments(x_bias))
    statistics = dict(mean_ptr=outputs["mean_ptr"], rstd_ptr=outputs["rstd_ptr"])
    if isinstance(launch, OneRead):
        blocks = -(-groups // launch.groups)
        arguments = dict(**sources, **affine, **outputs, **sizes, **modes, G=groups, D=depth, EPS=eps)
        arguments |= dict(**launch.block, **launch.channel_arguments(depth), blocks=blocks)
        registers = 128 if x2 is None else 255
        return [Call(_group_norm_silu_fwd_kernel, g.n * blocks, arguments, launch.warps, registers)]
    blocks, calls = -(-channels // launch.block_c), []
    if not norm_launch.fits_one_merge(depth, [source_sums.chunks for source_sums in sums]):
        chunks = launch.chunks(sizes["P"])
        sums = (ChannelSums(empty_float((g.n, chunks, 3, channels), x), launch.chunk),)
        stats_arguments = dict(**sources, **launch.block, C1=g.c1, C2=g.c2, blocks=blocks)
        stats_arguments |= dict(partial_ptr=sums[0].values, P=sizes["P"], chunk=launch.chunk, chunks=chunks)
        calls = [Call(_group_norm_silu_stats_kernel, g.n * chunks * blocks, stats_arguments, launch.warps)]
    first, second = sums[0], sums[1] if len(sums) > 1 else None
    merge_launch = norm_launch.choose_merge(
        g.shape(groups, x), max(source_sums.chunks for source_sums in sums)
    )
    first_channels = first.values.shape[-1]
    merge_arguments = dict(
        **statistics, **merge_launch.block, N=g.n, P=sizes["P"], G=groups, D=depth, EPS=eps
    )
    merge_arguments |= dict(
        partial_ptr=first.values,
        chunk=first.chunk,
        chunks=first.chunks,
        C1=first_channels,
        C2=channels - first_channels,
    )
    merge_arguments |= dict(partial2_ptr=second and second.values, chunk2=0, chunks2=0)
    if second is not None:
        merge_arguments |= dict(chunk2=second.chunk, chunks2=second.chunks)
    merge_arguments |= dict(**merge_launch.channel_arguments(depth), blocks=-(-groups // merge_launch.groups))
    slots = norm_launch.apply_slots(False, 1 if x2 is None else 2, g.resample, silu)
    span_arguments = launch.spans(g.n * blocks, sizes["P_OUT"] if g.resample == "down" else sizes["P"], slots)
    apply_arguments = dict(
        **sources, **affine, **outputs, **sizes, **modes, **span_arguments, G=groups, D=depth
    )
    apply_arguments |= dict(blocks=blocks, BLOCK_P=launch.apply_p, BLOCK_C=launch.block_c)
    programs = g.n * blocks * span_arguments["spans"]
    registers = 72 if x2 is None and g.resample is None else 128
    return [
        *calls,
        Call(
            _group_norm_silu_merge_fwd_kernel,
            g.n * merge_arguments["blocks"],
            merge_arguments,
            merge_launch.warps,
            255,
        ),
        Call(_group_norm_silu_apply_fwd_kernel, programs, apply_arguments, launch.apply_warps, registers),
    ]


def group_norm_silu_fwd(
    x: Tensor,
    x2: Tensor | None,
    x_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    resample: str | None,
    skip: bool,
    dtype: torch.dtype | None = None,
    sums: tuple[ChannelSums, ...] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute `act(GN([x, x2] + x_bias) (1 + scale) + shift)`, resampled.

    The formula is in `admfast/ops/norm/__init__.py`.

    Args: x [N, C1, *spatial] and x2 [N, C2, *spatial], float32, float16 or bfloat16, dense and
    channels-last; x_bias [C] or [N, C]; weight, bias [C]; scale, shift [N, C]; `skip`: return the resampled
    input, without x_bias, as well; `dtype`: of y, that of x for None; `sums`: statistics of x, and of x2 if
    there is one, if their producers attached them and no x_bias is added.

    Returns: y [N, C, *resampled] channels-last, the resampled input (empty unless `skip`), mean [2, N, G]
    (the mean and its rounding remainder) and rstd [N, G] in float32. Raises ValueError for another layout or
    dtype. Accumulates in float32; not differentiable by itself; never waits for the device.
    """
    g = geometry(x, x2, resample)
    shape = (g.n, g.c1 + g.c2, *g.out_spatial)
    y = empty(shape, x, dtype)
    resampled = empty(shape, x) if skip else None
    mean, rstd = empty_float((2, g.n, groups), x), empty_float((g.n, groups), x)
    outputs = dict(y_ptr=y, skip_ptr=resampled, mean_ptr=mean, rstd_ptr=rstd)
    if not g.empty:
        launch = norm_launch.choose(g.shape(groups, x), backward=False)
        affine = affine_arguments(weight, bias, scale, shift)
        plan_arguments = (x, x2, x_bias, g, affine, groups, eps, silu, outputs, launch, sums)
        norm_launch.run(plan_fwd(*plan_arguments), x.device)
    return y, x.new_empty(0) if resampled is None else resampled, mean, rstd
