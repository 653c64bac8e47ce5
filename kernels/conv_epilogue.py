"""Add bias and residual to a convolution's output in place, and take the statistics of its channels."""

import triton
import triton.language as tl
from admfast.kernels import norm_launch
from admfast.kernels.norm_launch import Call, Shape, TwoPass
from admfast.kernels.norm_tensors import DTYPES, ChannelSums, empty_float, is_channels_last
from admfast.kernels.norm_tiles import load_dense, moments, store_dense, store_moments
from torch import Tensor

BLOCK = 2048  # elements per program; with 8 warps a thread has 8 adjacent ones: 16 bytes in half precision
GROUPS = 32  # groups of the networks' norms, which decide whether a norm reads its input twice


@triton.jit
def _conv_epilogue_fwd_kernel(
    bias_ptr, residual_ptr, y_ptr, count, C, MULTIPLE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Add bias and residual to a block of consecutive elements; element i belongs to channel i % C."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    p_mask = i < tl.minimum(count - start, BLOCK).to(tl.int32)
    y = tl.load(y_ptr + start + i, mask=p_mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        # Unless it knows what divides the first channel, the compiler loads the bias element by element.
        first = tl.multiple_of((start % C).to(tl.int32), MULTIPLE)
        channel = (first + i) % C
        y += tl.load(bias_ptr + channel, mask=p_mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + start + i, mask=p_mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + start + i, y.to(y_ptr.dtype.element_ty), mask=p_mask)


@triton.jit
def _load_sum(y_ptr, residual_ptr, bias, n, p, p_mask, c, c_mask, P, C):
    """Return a tile of y + bias + residual as it will be stored, in float32."""
    y = load_dense(y_ptr, n, p, p_mask, c, c_mask, P, C) + bias[None, :]
    if residual_ptr is not None:
        y += load_dense(residual_ptr, n, p, p_mask, c, c_mask, P, C)
    return y.to(y_ptr.dtype.element_ty).to(tl.float32)


@triton.jit(do_not_specialize=["P", "chunk", "chunks", "blocks"])
def _conv_epilogue_sums_fwd_kernel(
    bias_ptr, residual_ptr, y_ptr, partial_ptr, P, C, chunk, chunks, blocks,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Add, and leave mean and squared deviations of every channel over each chunk: [N, chunks, 3, C]."""
    k = (tl.program_id(0) // blocks) % chunks
    n = tl.program_id(0) // blocks // chunks
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < C
    bias = tl.zeros([BLOCK_C], tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, mask=c_mask, other=0.0).to(tl.float32)
    begin, end = k * chunk, tl.minimum(k * chunk + chunk, P)
    p = begin + tl.arange(0, BLOCK_P)
    first = _load_sum(y_ptr, residual_ptr, bias, n, p, p < end, c, c_mask, P, C)
    # About the mean of the first tile, as the norm's own statistics are.
    pivot = tl.sum(tl.where((p < end)[:, None], first, 0.0), axis=0) / tl.minimum(end - begin, BLOCK_P)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(begin, end, BLOCK_P * UNROLL):
        for j in tl.static_range(UNROLL):
            p = start + j * BLOCK_P + tl.arange(0, BLOCK_P)
            y = _load_sum(y_ptr, residual_ptr, bias, n, p, p < end, c, c_mask, P, C)
            store_dense(y_ptr, y, n, p, p < end, c, c_mask, P, C)
            centred = tl.where((p < end)[:, None], y - pivot[None, :], 0.0)
            total += centred
            squares += centred * centred
    pivot, mean_offset, deviations = moments(pivot, total, squares, end - begin)
    store_moments(partial_ptr, pivot, mean_offset, deviations, n, k, c, c_mask, chunks, C)


def conv_epilogue_fwd(y: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """Compute `y + bias + residual` in place in `y`, and return it.

    Args: y and residual [N, C, *spatial], float32, float16 or bfloat16, dense and channels-last; bias [C].
    Raises ValueError for another layout, dtype or shape. Adds in float32 and rounds once; not differentiable
    by itself; never waits for the device.
    """
    _check(y, bias, residual)
    count = y.numel()
    if count and (bias is not None or residual is not None):
        bias = None if bias is None else bias.contiguous()
        channels = y.shape[1]
        arguments = dict(bias_ptr=bias, residual_ptr=residual, y_ptr=y, count=count, C=channels)
        arguments |= dict(MULTIPLE=1 if channels % 16 else 16, BLOCK=BLOCK)
        # 64 registers are only a limit (see `Call.options`): the kernel uses at most 36.
        call = Call(_conv_epilogue_fwd_kernel, triton.cdiv(count, BLOCK), arguments, warps=8, registers=64)
        norm_launch.run([call], y.device)
    return y


def conv_epilogue_sums_fwd(
    y: Tensor, bias: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, ChannelSums | None]:
    """Compute `y + bias + residual` into `y`, and return it with the statistics of its channels.

    Arguments and errors are those of `conv_epilogue_fwd`. There are no statistics where a norm of 32 groups
    would read `y` once anyway. They are those of y as rounded, in float32, in one order.
    """
    _check(y, bias, residual)
    n, channels, *spatial = y.shape
    positions = y.numel() // max(n * channels, 1)
    launch = None
    if y.numel() and not channels % GROUPS:
        shape = Shape(n, positions, channels, GROUPS, y.element_size(), sources=2)
        launch = norm_launch.choose(shape, backward=False)
    if not isinstance(launch, TwoPass):
        return conv_epilogue_fwd(y, bias, residual), None
    chunks, blocks = launch.chunks(positions), -(-channels // launch.block_c)
    sums = ChannelSums(empty_float((n, chunks, 3, channels), y), launch.chunk)
    arguments = dict(bias_ptr=None if bias is None else bias.contiguous(), residual_ptr=residual, y_ptr=y)
    arguments |= dict(partial_ptr=sums.values, P=positions, C=channels, chunk=launch.chunk, chunks=chunks)
    arguments |= dict(**launch.block, blocks=blocks)
    call = Call(_conv_epilogue_sums_fwd_kernel, n * chunks * blocks, arguments, launch.warps)
    norm_launch.run([call], y.device)
    return y, sums


def _check(y: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    """Raise ValueError for what the kernels can't read."""
    for name, t in (("y", y), ("residual", residual)):
        if t is not None and not is_channels_last(t):
            raise ValueError(f"{name}: strides {t.stride()} of {tuple(t.shape)} aren't dense channels-last")
    if y.dtype not in DTYPES:
        raise ValueError(f"y.dtype={y.dtype}: one of {', '.join(map(str, DTYPES))}")
    if residual is not None and residual.shape != y.shape:
        raise ValueError(f"residual.shape={tuple(residual.shape)}: must be {tuple(y.shape)}")
    if bias is not None and bias.shape != y.shape[1:2]:
        raise ValueError(f"bias.shape={tuple(bias.shape)}: must be {tuple(y.shape[1:2])}")
