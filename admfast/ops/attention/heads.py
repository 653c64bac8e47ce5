"""The heads of a qkv projection, as views, in both published row orders."""

from __future__ import annotations

import torch
from torch import Tensor


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


def join_qkv(q: Tensor, k: Tensor, v: Tensor, legacy_order: bool) -> Tensor:
    """Undo `split_qkv` in one copy: three [N, h, S, d] -> [N, S, 3*h*d]."""
    parts = [t.transpose(1, 2) for t in (q, k, v)]  # [N, S, h, d]
    return torch.stack(parts, dim=3 if legacy_order else 2).flatten(2)


def merge_heads(out: Tensor) -> Tensor:
    """Reshape [N, h, S, d] to [N, S, h*d]; a view for the outputs of the kernels."""
    n, h, s, d = out.shape
    return out.transpose(1, 2).reshape(n, s, h * d)


def split_heads(out: Tensor, num_heads: int) -> Tensor:
    """View [N, S, h*d] as [N, h, S, d]."""
    return out.unflatten(-1, (num_heads, -1)).transpose(1, 2)
