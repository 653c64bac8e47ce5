"""Self-attention on channels-last tokens, straight from the qkv product, in both published row orders."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from admfast.errors import invalid
from admfast.ops.dispatch import Implementation, OpTable


def split_qkv(qkv: Tensor, num_heads: int, legacy_order: bool) -> tuple[Tensor, Tensor, Tensor]:
    """View [N, S, 3*h*d] as q, k, v of [N, h, S, d] each, without a copy.

    Legacy rows are laid out [h, 3, d] (heads first), new ones [3, h, d].
    """
    n, s, width = qkv.shape
    d = width // (3 * num_heads)
    if legacy_order:
        q, k, v = qkv.view(n, s, num_heads, 3, d).unbind(3)
    else:
        q, k, v = qkv.view(n, s, 3, num_heads, d).unbind(2)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def attention_ref(qkv: Tensor, num_heads: int, *, legacy_order: bool = False) -> Tensor:
    """Reference of `attention`: q and k scaled by d^-1/4 each, softmax in float32 (float64 for float64)."""
    q, k, v = split_qkv(qkv, num_heads, legacy_order)
    scale = q.shape[-1] ** -0.25
    logits = (q * scale) @ (k * scale).transpose(-1, -2)  # [N, h, S, S]
    wide = torch.promote_types(qkv.dtype, torch.float32)
    weights = torch.softmax(logits.to(wide), dim=-1).to(qkv.dtype)
    return _merge_heads(weights @ v)


def _sdpa(qkv: Tensor, num_heads: int, *, legacy_order: bool = False) -> Tensor:
    """torch's scaled_dot_product_attention on strided views of the same tensor."""
    q, k, v = split_qkv(qkv, num_heads, legacy_order)
    return _merge_heads(F.scaled_dot_product_attention(q, k, v))


def _merge_heads(out: Tensor) -> Tensor:
    """[N, h, S, d] -> [N, S, h*d]."""
    n, h, s, d = out.shape
    return out.transpose(1, 2).reshape(n, s, h * d)


def attention(qkv: Tensor, num_heads: int, *, legacy_order: bool = False, impl: str | None = None) -> Tensor:
    """Compute `softmax(q k^T / sqrt(d)) v` for every head of every sample.

    Source: Vaswani et al. 2017; the two row orders are those of the published ADM attention classes.

    Args:
        qkv: [N, S, 3*h*d], contiguous in its last dimension; float16, bfloat16, float32 or float64.
        num_heads: h; 3*h must divide the last dimension.
        legacy_order: rows are [h, 3, d] instead of [3, h, d].
        impl: name of an implementation (see `admfast info`); None chooses.

    Returns:
        [N, S, h*d], dtype of `qkv`.

    Raises:
        InvalidArgument: for a shape that `num_heads` doesn't divide, or a dtype that isn't floating.

    Softmax accumulates in float32 (float64 for float64 input). Differentiable in `qkv`, twice with
    `reference`.
    """
    if qkv.dim() != 3:
        raise invalid("qkv.shape", tuple(qkv.shape), "[N, S, 3*h*d]")
    if not qkv.dtype.is_floating_point:
        raise invalid("qkv.dtype", qkv.dtype, "a floating dtype")
    if num_heads < 1 or qkv.shape[-1] % (3 * num_heads):
        raise invalid("num_heads", num_heads, f"3*num_heads must divide the {qkv.shape[-1]} channels of qkv")
    entry = TABLE.choose(impl, qkv, num_heads, legacy_order=legacy_order)
    return entry.forward(qkv, num_heads, legacy_order=legacy_order)


def _sdpa_supports(qkv: Tensor, num_heads: int, *, legacy_order: bool = False) -> str | None:
    return None if qkv.stride(-1) == 1 else "the last dimension of qkv is not contiguous"


TABLE = OpTable(
    "attention",
    [Implementation("sdpa", _sdpa, supports=_sdpa_supports), Implementation("reference", attention_ref)],
)
