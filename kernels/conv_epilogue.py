"""Add bias and residual to a convolution's output, in place and in one pass."""

import triton
import triton.language as tl
from admfast.kernels import norm_launch
from admfast.kernels.norm_launch import Call
from admfast.kernels.norm_tensors import DTYPES, is_channels_last
from torch import Tensor

BLOCK = 2048  # elements per program; with 8 warps a thread has 8 adjacent ones: 16 bytes in half precision


@triton.jit
def _conv_epilogue_fwd_kernel(
    bias_ptr, residual_ptr, y_ptr, count, C, MULTIPLE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Add bias and residual to a block of consecutive elements; element i belongs to channel i % C."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    inside = i < tl.minimum(count - start, BLOCK).to(tl.int32)
    y = tl.load(y_ptr + start + i, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        # Unless it knows what divides the first channel, the compiler loads the bias element by element.
        first = tl.multiple_of((start % C).to(tl.int32), MULTIPLE)
        channel = (first + i) % C
        y += tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + start + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + start + i, y.to(y_ptr.dtype.element_ty), mask=inside)


def conv_epilogue_fwd(y: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """Compute `y + bias + residual` in place in `y`, and return it.

    Args: y and residual [N, C, *spatial], float32, float16 or bfloat16, dense and channels-last; bias [C].
    Raises ValueError for another layout, dtype or shape. Adds in float32 and rounds once; not differentiable
    by itself; never waits for the device.
    """
    for name, t in (("y", y), ("residual", residual)):
        if t is not None and not is_channels_last(t):
            raise ValueError(f"{name}: strides {t.stride()} of {tuple(t.shape)} aren't dense channels-last")
    if y.dtype not in DTYPES:
        raise ValueError(f"y.dtype={y.dtype}: one of {', '.join(map(str, DTYPES))}")
    if residual is not None and residual.shape != y.shape:
        raise ValueError(f"residual.shape={tuple(residual.shape)}: must be {tuple(y.shape)}")
    if bias is not None and bias.shape != y.shape[1:2]:
        raise ValueError(f"bias.shape={tuple(bias.shape)}: must be {tuple(y.shape[1:2])}")
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
