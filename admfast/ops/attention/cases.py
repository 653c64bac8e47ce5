"""Cases of `attention`: an example, small cases of odd sizes, and the shapes of the released networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from admfast.ops.attention import attention
from admfast.ops.cases import Case, Draw, OpCases

SMALL = (
    dict(n=2, tokens=5, heads=1, head_dim=3),
    dict(n=1, tokens=9, heads=3, head_dim=8, legacy_order=False),
    dict(n=2, tokens=130, heads=2, head_dim=8),
)
# Each entry is "model tokens x heads x channels per head". Heads have 64 channels, except in the 128 px model
# and the 64->256 upsampler, which fix four heads instead. No released model has 32 channels per head, but
# small models are trained with that width.
_NETWORKS = """
unet256 1024x8x64   unet256 256x16x64   unet256 64x16x64   unet64 1024x6x64   unet64 256x9x64  unet64 64x12x64
unet128 1024x4x128  unet128 256x4x192   unet128 64x4x256   up64_256 1024x4x96 up64_256 256x4x192
up64_256 64x4x192   up128_512 1024x12x64   clf64 1024x4x64  clf64 256x6x64   clf64 64x8x64
small 256x4x32   small 64x4x32
"""


def _real(model: str, size: str) -> tuple[str, Case]:
    tokens, heads, head_dim = map(int, size.split("x"))
    return f"{model} {size}", dict(tokens=tokens, heads=heads, head_dim=head_dim)


REAL = dict(_real(*words) for words in zip(*[iter(_NETWORKS.split())] * 2, strict=True))


def arguments(
    draw: Draw,
    dtype: torch.dtype,
    *,
    n: int = 1,
    tokens: int = 64,
    heads: int = 8,
    head_dim: int = 64,
    legacy_order: bool = True,
) -> dict[str, Any]:
    """Make the arguments, by default in the row order of the released models."""
    qkv = draw(n, tokens, 3 * heads * head_dim).to(dtype)
    return dict(qkv=qkv, num_heads=heads, legacy_order=legacy_order)


def wrong() -> list[tuple[dict[str, Any], str]]:
    """Return arguments that every implementation rejects."""
    qkv = torch.ones(1, 64, 1536)
    replacements: list[tuple[dict[str, Any], str]] = [
        (dict(num_heads=value), "num_heads") for value in (2.0, None, 0, 7, True, torch.tensor(8))
    ]
    replacements += [(dict(qkv=value), "qkv.dtype") for value in (qkv.long(), qkv.to(torch.float8_e5m2))]
    replacements += [(dict(qkv=value), "qkv.shape") for value in (qkv[0], qkv[..., :0])]
    return [*replacements, (dict(qkv=None), "qkv")]


def _call_cpp_ops(call_op: Callable[..., Any], qkv: Tensor, num_heads: int, legacy_order: bool) -> None:
    out, lse = call_op("attention_fwd", qkv, num_heads, legacy_order)
    call_op("attention_bwd", torch.ones_like(out), qkv, out, lse, num_heads, legacy_order)


CASES = [
    OpCases(
        "attention",
        attention,
        arguments,
        SMALL,
        REAL,
        wrong,
        differentiable=("qkv",),
        call_raw_ops={"cpp": _call_cpp_ops},
    )
]
