"""Self-attention on the output of the qkv projection (channels-last tokens), in both published row orders."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from admfast import checks
from admfast.errors import Unavailable, invalid
from admfast.ops.attention import kernels
from admfast.ops.attention.heads import join_qkv, merge_heads, split_heads, split_qkv
from admfast.ops.attention.kernels import Kernel
from admfast.ops.dispatch import Implementation, OpTable
from admfast.ops.transforms import apply_autograd, in_autocast, in_program_trace, in_vmap, is_intercepted


def attention_ref(qkv: Tensor, num_heads: int, *, legacy_order: bool = False) -> Tensor:
    """Compute `attention` in plain PyTorch: q and k are multiplied by d^-1/4 each before their product.

    The softmax is in float32 (float64 for float64 input).
    """
    q, k, v = split_qkv(qkv, num_heads, legacy_order)
    scale = q.shape[-1] ** -0.25
    logits = (q * scale) @ (k * scale).transpose(-1, -2)  # [N, h, S, S]
    wide = torch.promote_types(qkv.dtype, torch.float32)
    weights = torch.softmax(logits.to(wide), dim=-1).to(qkv.dtype)
    return merge_heads(weights @ v)


def attention_bwd_bwd_ref(
    g: Tensor, dout: Tensor, qkv: Tensor, num_heads: int, *, legacy_order: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `sum(g * dqkv)` in dout and qkv; dqkv is the input gradient of `attention`.

    With c = d^-1/2, P = softmax(c q k^T), dP = dout v^T and r(X) = X - rowsum(P X), the backward is
    dS = P r(dP), dq = c dS k, dk = c dS^T q, dv = P^T dout. Its gradient, with G = c (g_q k^T + q g_k^T),
    B = P r(G) and C = P r(G r(dP) - dP rowsum(P G) + dout g_v^T), is
    d_dout = B v + P g_v, d_q = c (C k + dS g_k), d_k = c (C^T q + dS^T g_q), d_v = B^T dout.

    Args:
        g: [N, S, 3*h*d], like `qkv`.
        dout: [N, S, h*d], the gradient of the output of `attention`.
        qkv, num_heads, legacy_order: as in `attention`.

    Returns:
        [N, S, h*d] and [N, S, 3*h*d], dtypes of `dout` and `qkv`; computed in float32 (float64 for float64)
        by plain PyTorch, so that it can itself be differentiated any number of times.
    """
    wide = torch.promote_types(qkv.dtype, torch.float32)
    q, k, v = split_qkv(qkv.to(wide), num_heads, legacy_order)
    g_q, g_k, g_v = split_qkv(g.to(wide).contiguous(), num_heads, legacy_order)
    do = split_heads(dout.to(wide), num_heads)
    c = q.shape[-1] ** -0.5
    p = torch.softmax(c * q @ k.mT, dim=-1)  # [N, h, S, S]

    def r(x: Tensor) -> Tensor:
        return x - (p * x).sum(-1, keepdim=True)

    dp = do @ v.mT
    ds = p * r(dp)
    big_g = c * (g_q @ k.mT + q @ g_k.mT)
    b = p * r(big_g)
    big_c = p * r(big_g * r(dp) - dp * (p * big_g).sum(-1, keepdim=True) + do @ g_v.mT)
    d_dout = merge_heads(b @ v + p @ g_v)
    d_qkv = join_qkv(c * (big_c @ k + ds @ g_k), c * (big_c.mT @ q + ds.mT @ g_q), b.mT @ do, legacy_order)
    return d_dout.to(dout.dtype), d_qkv.to(qkv.dtype)


class AttentionFn(torch.autograd.Function):
    """Autograd of a fused kernel; the gradient of its backward is `attention_bwd_bwd_ref`.

    The kernels have no second derivative. The backward does not repeat the forward: out and the log-sum-exp
    are saved, as by torch's own autograd.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(qkv: Tensor, num_heads: int, legacy_order: bool, kernel: Kernel) -> tuple[Tensor, ...]:
        return kernel.forward(qkv, num_heads, legacy_order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        qkv, *ctx.options = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(qkv, *output)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if dout is None:
            return None, None, None, None
        qkv, *saved = ctx.saved_tensors
        # An ordinary backward runs under no_grad and needs no graph of its own.
        backward = AttentionBackwardFn.apply if torch.is_grad_enabled() else AttentionBackwardFn.forward
        return backward(dout, qkv, *ctx.options, *saved), None, None, None

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        raise _no_forward_mode()


class AttentionBackwardFn(torch.autograd.Function):
    """The fused backward: (dout, qkv, ...) -> dqkv, with `attention_bwd_bwd_ref` as its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        dout: Tensor, qkv: Tensor, num_heads: int, legacy_order: bool, kernel: Kernel, *saved: Tensor
    ) -> Tensor:
        return kernel.backward(dout, qkv, num_heads, legacy_order, *saved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        dout, qkv, ctx.num_heads, ctx.legacy_order, *rest = inputs
        ctx.num_other_inputs = 2 + len(rest)
        ctx.save_for_backward(dout, qkv)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dout, qkv = ctx.saved_tensors
        d_dout, d_qkv = attention_bwd_bwd_ref(g, dout, qkv, ctx.num_heads, legacy_order=ctx.legacy_order)
        # The saved tensors are functions of qkv, and d_qkv includes that dependence.
        return d_dout, d_qkv, *[None] * ctx.num_other_inputs

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        raise _no_forward_mode()


def _no_forward_mode() -> Unavailable:
    return Unavailable("attention: no forward-mode derivative of the fused kernels; impl='reference' has one")


def _needs_attention_fn(qkv: Tensor) -> bool:
    """Tell whether a call goes through `AttentionFn`: in eager mode, if a gradient may be needed.

    torch.compile, torch.jit.trace and torch.func.vmap get the library's op with the library's own first
    derivative instead. This loses no second derivative, because none of them has one (compiled graphs can't
    be differentiated twice), and it is needed because a compiled torch.func.grad of a Function around a raw
    op silently gives zeros.
    """
    if torch.compiler.is_compiling() or in_program_trace():
        return False
    if torch.autograd.forward_ad._current_level < 0 and not (torch.is_grad_enabled() and qkv.requires_grad):
        return False
    return not in_vmap()


def _sdpa(qkv: Tensor, num_heads: int, *, legacy_order: bool = False) -> Tensor:
    """Call torch's scaled_dot_product_attention, which chooses its kernel, on strided views of qkv."""
    q, k, v = split_qkv(qkv, num_heads, legacy_order)
    if not _needs_attention_fn(qkv):
        if q.shape[-1] < kernels.VECTOR_WIDTH and not (is_intercepted(qkv) or in_autocast(qkv.device)):
            kernel = kernels.find_torch_kernel(q, k, v)
            if kernel is kernels.FLASH_CPU:  # it pads narrow heads, which makes it faster
                return kernel.infer(qkv, num_heads, legacy_order)
        return merge_heads(F.scaled_dot_product_attention(q, k, v))
    kernel = kernels.find_torch_kernel(q, k, v)
    if kernel is None:  # torch's plain formula, which can be differentiated any number of times
        return merge_heads(torch.ops.aten._scaled_dot_product_attention_math(q, k, v)[0])
    return apply_autograd(AttentionFn, qkv, num_heads, legacy_order, kernel)[0]


def _sdpa_unsupported(qkv: Tensor, num_heads: int, *, legacy_order: bool = False) -> str | None:
    return None if qkv.stride(-1) == 1 else "the last dimension of qkv is not contiguous"


def _run_kernel(kernel: Kernel, qkv: Tensor, num_heads: int, *, legacy_order: bool = False) -> Tensor:
    """Compute attention with the given kernel."""
    if _needs_attention_fn(qkv):
        return apply_autograd(AttentionFn, qkv, num_heads, legacy_order, kernel)[0]
    if qkv.requires_grad:
        return kernel.forward(qkv, num_heads, legacy_order)[0]
    return kernel.infer(qkv, num_heads, legacy_order)


def _flash(qkv: Tensor, num_heads: int, *, legacy_order: bool = False) -> Tensor:
    kernel = kernels.FLASH_CPU if qkv.device.type == "cpu" else kernels.FLASH
    return _run_kernel(kernel, qkv, num_heads, legacy_order=legacy_order)


def attention(qkv: Tensor, num_heads: int, *, legacy_order: bool = False, impl: str | None = None) -> Tensor:
    """Compute `softmax(q k^T / sqrt(d)) v` for every head of every sample.

    Source: Vaswani et al. 2017; the two row orders are those of the published ADM attention classes.

    Args:
        qkv: [N, S, 3*h*d], contiguous in its last dimension; float16, bfloat16, float32 or float64.
        num_heads: h; 3*h must divide the last dimension.
        legacy_order: rows are [h, 3, d] instead of [3, h, d]. Both are read in place: in either order q, k
            and v of a head are rows of d numbers, 3*h*d apart.
        impl: name of an implementation (see `admfast info`); None: chosen automatically.

    Returns:
        [N, S, h*d], dtype of `qkv`.

    Raises:
        InvalidArgument: for a shape that `num_heads` doesn't divide, or a dtype that isn't floating.
        Unavailable: for a named implementation that can't serve the call, and for forward-mode
            differentiation of a fused one.

    Softmax accumulates in float32 (float64 for float64 input). Differentiable in `qkv` any number of times:
    the first derivative is the implementation's own backward, further ones come from a formula
    (`attention_bwd_bwd_ref`). Under torch.compile and torch.func.vmap fused implementations have only the
    first derivative.
    """
    checks.float_tensor("qkv", qkv)
    if qkv.dim() != 3 or not qkv.shape[-1]:
        raise invalid("qkv.shape", tuple(qkv.shape), "[N, S, 3*h*d] with channels")
    checks.whole_number("num_heads", num_heads, 1, allow_tensor=False)
    if qkv.shape[-1] % (3 * num_heads):
        raise invalid("num_heads", num_heads, f"3*num_heads must divide the {qkv.shape[-1]} channels of qkv")
    entry = TABLE.choose(impl, qkv, num_heads, legacy_order=legacy_order)
    return entry.forward(qkv, num_heads, legacy_order=legacy_order)


def _kernel_entry(
    name: str,
    forward: Callable[..., Tensor],
    reason_missing: Callable[[], str | None],
    unsupported_heads: Callable[..., str | None],
    **options: Any,
) -> Implementation:
    """Return the table's entry for one kernel.

    `unsupported_heads(q, k, v)` returns the reason why it can't serve a call, or None.
    """

    def reason_unsupported(qkv: Tensor, num_heads: int, *, legacy_order: bool = False) -> str | None:
        reason = _sdpa_unsupported(qkv, num_heads)
        if reason is None and in_vmap():
            reason = "not under torch.func.vmap"
        return reason or unsupported_heads(*split_qkv(qkv, num_heads, legacy_order))

    return Implementation(name, forward, reason_missing, reason_unsupported, **options)


def _torch_entry(
    name: str, forward: Callable[..., Tensor], reason_missing: Callable[[], str | None] = kernels.cuda_missing
) -> Implementation:
    """Return the table's entry for one of PyTorch's kernels."""
    return _kernel_entry(f"sdpa-{name}", forward, reason_missing, partial(kernels.torch_unsupported, name))


_xformers = partial(_run_kernel, kernels.XFORMERS)
_cpp = partial(_run_kernel, kernels.CPP)
# "sdpa" chooses among PyTorch's kernels and supports every call that they support, so each kernel's own
# entry runs only if named.
TABLE = OpTable(
    "attention",
    [
        _kernel_entry("xformers", _xformers, kernels.xformers_missing, kernels.xformers_unsupported),
        _kernel_entry(
            "cpp",
            _cpp,
            kernels.cpp_missing,
            kernels.cpp_unsupported,
            reason_named_only=kernels.cpp_named_only,
        ),
        Implementation("sdpa", _sdpa, reason_unsupported=_sdpa_unsupported),
        _torch_entry("flash", _flash, reason_missing=lambda: None),
        _torch_entry("cudnn", partial(_run_kernel, kernels.CUDNN)),
        _torch_entry("efficient", partial(_run_kernel, kernels.EFFICIENT)),
        Implementation("reference", attention_ref),
    ],
)
