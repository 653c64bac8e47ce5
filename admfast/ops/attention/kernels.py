"""The fused kernels of `attention`: raw forward and backward, and the reasons why one can't serve a call.

They are PyTorch's own (through ATen), xformers', and one in C++ for the CPU. All read q, k and v in place:
in either published row order a head is S rows of d adjacent numbers, 3*h*d apart, so neither order needs a
copy or permuted weights.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from admfast.errors import first_line
from admfast.ops import native
from admfast.ops.attention.heads import join_qkv, merge_heads, split_heads, split_qkv
from admfast.ops.transforms import has_op_observer, in_program_trace, plain_eager_mode

ATEN = torch.ops.aten


@dataclass(frozen=True)
class Kernel:
    """One fused attention.

    `forward(qkv, num_heads, legacy_order)` returns (out, *saved), and `backward(dout, qkv, num_heads,
    legacy_order, out, *saved)` returns dqkv; neither is differentiable. `infer(qkv, num_heads, legacy_order)`
    returns only out. qkv and dqkv are [N, S, 3*h*d], out and dout [N, S, h*d].
    """

    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., Tensor]
    infer: Callable[..., Tensor]


def _kernel_from_heads(
    forward: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., Any],
    infer: Callable[..., Tensor] | None = None,
) -> Kernel:
    """Return a kernel made of functions of q, k, v, out and their gradients, each [N, h, S, d].

    infer: None: the first result of `forward`.
    """

    def qkv_forward(qkv: Tensor, num_heads: int, legacy_order: bool) -> tuple[Tensor, ...]:
        out, *saved = forward(*split_qkv(qkv, num_heads, legacy_order))
        return merge_heads(out), *saved

    def qkv_backward(
        dout: Tensor, qkv: Tensor, num_heads: int, legacy_order: bool, out: Tensor, *saved: Tensor
    ) -> Tensor:
        # Gradients of a sum or a mean have stride 0, but the kernels need contiguous rows.
        do, out = (split_heads(t, num_heads) for t in (dout.contiguous(), out))
        dq, dk, dv = backward(do, *split_qkv(qkv, num_heads, legacy_order), out, *saved)
        return join_qkv(dq, dk, dv, legacy_order)

    def qkv_infer(qkv: Tensor, num_heads: int, legacy_order: bool) -> Tensor:
        q, k, v = split_qkv(qkv, num_heads, legacy_order)
        return merge_heads(forward(q, k, v)[0] if infer is None else infer(q, k, v))

    return Kernel(qkv_forward, qkv_backward, qkv_infer)


# PyTorch's kernels. The order of the arguments of the backward is that of torch's own derivative formulas.


# A vector holds 16 numbers. With 1024 positions torch's kernel takes 1.5 times as long for heads of 8 as for
# heads of 16, forward and backward; with 64 positions both take the same time. Zeros don't change a product.
VECTOR_WIDTH, MIN_POSITIONS_TO_PAD = 16, 128


def _pad_heads(q: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Pad narrow heads with zeros to the width of a vector, if there are many positions."""
    padding = VECTOR_WIDTH - q.shape[-1]
    if padding <= 0 or q.shape[2] < MIN_POSITIONS_TO_PAD:
        return (q, *tensors)
    return tuple(F.pad(t, (0, padding)) for t in (q, *tensors))


def _trim_heads(d: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tensors if tensors[0].shape[-1] == d else tuple(t[..., :d] for t in tensors)


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    d = q.shape[-1]
    q, k, v = _pad_heads(q, k, v)
    out, lse = ATEN._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=d**-0.5)
    return *_trim_heads(d, out), lse


def _cpu_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Any:
    d = q.shape[-1]
    q, k, v, dout, out = _pad_heads(q, k, v, dout, out)
    backward = ATEN._scaled_dot_product_flash_attention_for_cpu_backward
    return _trim_heads(d, *backward(dout, q, k, v, out, lse, 0.0, False, scale=d**-0.5))


def _flash_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    out, lse, _, _, _, _, seed, offset, _ = ATEN._scaled_dot_product_flash_attention(q, k, v)
    return out, lse, seed, offset


def _flash_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *saved: Tensor) -> Any:
    out, lse, seed, offset = saved
    s = q.shape[2]
    return ATEN._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse, None, None, s, s, 0.0, False, seed, offset
    )


def _efficient_forward(q: Tensor, k: Tensor, v: Tensor, with_lse: bool = True) -> tuple[Tensor, ...]:
    return ATEN._scaled_dot_product_efficient_attention(q, k, v, None, with_lse)


def _efficient_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *saved: Tensor) -> Any:
    out, lse, seed, offset = saved
    mask = [True, True, True, False]
    return ATEN._scaled_dot_product_efficient_attention_backward(
        dout, q, k, v, None, out, lse, seed, offset, 0.0, mask
    )[:3]


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    out, lse, _, _, _, _, seed, offset, _ = ATEN._scaled_dot_product_cudnn_attention(q, k, v, None, True)
    return out, lse, seed, offset


def _cudnn_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *saved: Tensor) -> Any:
    out, lse, seed, offset = saved
    s = q.shape[2]
    return ATEN._scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, lse, seed, offset, None, None, None, s, s, 0.0, False
    )


def _cudnn_infer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ATEN._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0]


FLASH_CPU = _kernel_from_heads(_cpu_forward, _cpu_backward)
FLASH = _kernel_from_heads(_flash_forward, _flash_backward)
EFFICIENT = _kernel_from_heads(
    _efficient_forward, _efficient_backward, lambda q, k, v: _efficient_forward(q, k, v, False)[0]
)
CUDNN = _kernel_from_heads(_cudnn_forward, _cudnn_backward, _cudnn_infer)


def find_torch_kernel(q: Tensor, k: Tensor, v: Tensor) -> Kernel | None:
    """Return the kernel that scaled_dot_product_attention would use for a call; None: its plain formula."""
    choice = torch._fused_sdp_choice(q, k, v)
    if q.device.type == "cpu":
        return FLASH_CPU if choice == SDPBackend.FLASH_ATTENTION.value else None
    if q.shape[-1] % 8:  # for these torch pads the heads, outside of its kernel
        return None
    kernels = {
        SDPBackend.FLASH_ATTENTION.value: FLASH,
        SDPBackend.EFFICIENT_ATTENTION.value: EFFICIENT,
        SDPBackend.CUDNN_ATTENTION.value: CUDNN,
    }
    return kernels.get(choice)


def torch_unsupported(backend: str, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Return why PyTorch's kernel "flash", "efficient" or "cudnn" can't serve a call; None if it can."""
    if q.device.type == "cpu":
        if backend != "flash":
            return "not on a CPU"
        if torch.compiler.is_compiling() or find_torch_kernel(q, k, v) is FLASH_CPU:
            return None
        return "torch has no fused attention for this call"
    if q.device.type != "cuda":
        return f"not on {q.device.type}"
    if q.shape[-1] % 8:
        return f"head dim {q.shape[-1]} is not a multiple of 8"
    if torch.compiler.is_compiling():  # the checks below can't be traced; the kernels have their own
        return None
    can_use = getattr(torch.backends.cuda, f"can_use_{backend}_attention")
    params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, False)
    if can_use(params, False):
        return None
    with warnings.catch_warnings(record=True) as caught:  # torch gives its reasons as warnings
        warnings.simplefilter("always")
        can_use(params, True)
    reasons = [str(warning.message).split(" (Triggered")[0].strip() for warning in caught]
    return "; ".join(reasons) or "torch can't use it for this call"


# Ours for the CPU


def _native_forward(qkv: Tensor, num_heads: int, legacy_order: bool) -> tuple[Tensor, ...]:
    return native.ops().attention_fwd(qkv, num_heads, legacy_order)


def _native_backward(
    dout: Tensor, qkv: Tensor, num_heads: int, legacy_order: bool, out: Tensor, lse: Tensor
) -> Tensor:
    return native.ops().attention_bwd(dout.contiguous(), qkv, out, lse, num_heads, legacy_order)


CPP = Kernel(_native_forward, _native_backward, lambda *arguments: _native_forward(*arguments)[0])


@native.fake("attention_fwd")
def _fake_fwd(qkv: Tensor, heads: int, _legacy_order: bool) -> tuple[Tensor, Tensor]:
    n, s, width = qkv.shape
    return qkv.new_empty(n, s, width // 3), qkv.new_empty(n, heads, s, dtype=torch.float32)


@native.fake("attention_bwd")
def _fake_bwd(_dout: Tensor, qkv: Tensor, *_: Any) -> Tensor:
    return qkv.new_empty(qkv.shape)


def cpp_missing() -> str | None:
    """Return why the compiled attention can't run in this process; None if it can."""
    return native.reason_missing() or _reason_torch_only()


def cpp_named_only() -> str | None:
    """Return why the compiled attention should run only if named; None if it is the fastest."""
    if has_op_observer():
        return "a trace or a dispatch mode knows only torch's own operations"
    return None if native.uses_amx() else "measured to be faster only with AMX"


def cpp_unsupported(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Return why the compiled attention can't serve a call; None if it can."""
    if q.device.type != "cpu":
        return f"not on {q.device.type}"
    return None if q.dtype == torch.bfloat16 else f"qkv is {q.dtype}; it serves bfloat16 only"


def _reason_torch_only() -> str | None:
    """Return why only torch's own attention can be traced, if a trace is being made."""
    if torch.compiler.is_compiling():
        return "torch.compile traces scaled_dot_product_attention instead"
    return "a traced program may contain only torch's own operations" if in_program_trace() else None


# xformers


def _fmha() -> Any:
    """Import xformers' attention. Nothing else imports it, so it is loaded only for CUDA tensors."""
    return importlib.import_module("xformers.ops.fmha")


def _swap_heads_and_positions(*tensors: Tensor) -> list[Tensor]:
    """Swap the dimensions h and S, as views: [N, h, S, d] <-> [N, S, h, d]."""
    return [t.transpose(1, 2) for t in tensors]


def _xformers_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    out, lse = _fmha().memory_efficient_attention_forward_requires_grad(*_swap_heads_and_positions(q, k, v))
    return out.transpose(1, 2), lse


def _xformers_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Any:
    dout, q, k, v, out = _swap_heads_and_positions(dout, q, k, v, out)
    return tuple(
        _swap_heads_and_positions(*_fmha().memory_efficient_attention_backward(dout, out, lse, q, k, v))
    )


def _xformers_infer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _fmha().memory_efficient_attention_forward(*_swap_heads_and_positions(q, k, v)).transpose(1, 2)


XFORMERS = _kernel_from_heads(_xformers_forward, _xformers_backward, _xformers_infer)


def xformers_missing() -> str | None:
    """Return why xformers can't run in this process at all; None if it may. Imports nothing."""
    return _reason_torch_only() or cuda_missing() or _xformers_not_installed()


def cuda_missing() -> str | None:
    """Return why no CUDA kernel can run in this process; None if they may."""
    return None if torch.cuda.is_available() else "no CUDA device"


@functools.cache
def _xformers_not_installed() -> str | None:
    return None if importlib.util.find_spec("xformers") else "xformers is not installed"


def xformers_unsupported(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Return why xformers can't serve a call; None if it can."""
    n, h, s, d = q.shape
    if q.device.type != "cuda":
        return f"not on {q.device.type}"
    if q.dtype == torch.float64:
        return "no float64"
    if not 0 < d <= 256 or d % 8:
        return f"head dim {d} is not a multiple of 8 up to 256"
    if not n * h * s:
        return "nothing to attend to"
    # Reads are 16 bytes wide, so the offset of the first element and the strides of samples, heads and rows
    # must be multiples of 8 elements.
    if any(elements % 8 for t in (q, k, v) for elements in (t.storage_offset(), *t.stride()[:3])):
        return "rows of qkv are not aligned to 8 elements"
    return _xformers_trial(q.device.index or 0, q.dtype, d)


@functools.cache
def _xformers_trial(device: int, dtype: torch.dtype, d: int) -> str | None:
    """Run one small attention, forward and backward, on the device; return why it failed, or None.

    The package can be installed without its kernels.
    """
    try:
        with plain_eager_mode():
            ones = torch.ones(1, 1, 8, d, device=f"cuda:{device}", dtype=dtype)
            out, lse = _xformers_forward(ones, ones, ones)
            gradients = _xformers_backward(torch.ones_like(out), ones, ones, ones, out, lse)
            is_correct = all(bool(torch.isfinite(t).all()) for t in (out, *gradients)) and torch.equal(
                out, ones
            )
    except Exception as error:  # another package may raise anything; its text is the reason
        return f"its trial failed: {first_line(error)}"
    return None if is_correct else "its trial gave wrong numbers"
