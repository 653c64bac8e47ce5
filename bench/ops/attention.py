"""Measurements of attention at ADM's token counts and head widths: torch's backends, our implementations."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.measure import (
    DTYPES,
    Case,
    Settings,
    Unavailable,
    check_error,
    first_line,
    measure_call,
    product_limit,
    unavailable,
)
from bench.results import Row
from bench.shapes import BATCHES, AttentionShape, attention_shapes

BACKENDS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}
CUDA_ONLY = ("sdpa cudnn", "sdpa efficient")
PRECISIONS = {"cuda": ("fp16", "bf16"), "cpu": ("bf16", "fp32")}


def _limit(dtype: str, tokens: int) -> float:
    """Return the error bound: a backend may round scores, weights and output to the dtype."""
    return 3 * torch.finfo(DTYPES[dtype]).eps + product_limit(dtype, tokens)


def _grid(settings: Settings) -> list[tuple[int, AttentionShape, str, int, str]]:
    """Return (rank, shape, models, batch, dtype), with each size once; low ranks come first."""
    sizes: dict[tuple[int, int, int], list[AttentionShape]] = {}
    for shape in attention_shapes()[2:3] if settings.quick else attention_shapes():
        sizes.setdefault((shape.tokens, shape.heads, shape.head_dim), []).append(shape)
    return [
        (b + d, same[0], ", ".join(s.model for s in same), batch, dtype)
        for b, batch in enumerate(settings.some(BATCHES))
        for d, dtype in enumerate(settings.some(PRECISIONS))
        for same in sizes.values()
    ]


def _fields(shape: AttentionShape, batch: int) -> dict[str, int]:
    return {"batch": batch, "tokens": shape.tokens, "heads": shape.heads, "head_dim": shape.head_dim}


def ceilings(settings: Settings) -> Iterator[Case]:
    """Yield every backend at every shape; if it refuses a shape, its message is the row's reason."""
    missing = () if settings.cuda else CUDA_ONLY
    for _, shape, models, batch, dtype in sorted(_grid(settings), key=lambda row: row[0]):
        for name in BACKENDS:
            if name not in missing:
                measure = partial(_ceiling, shape, batch, dtype, BACKENDS[name])
                yield Case("attention", dtype, name, _fields(shape, batch), measure, {"models": models})
    for name in missing:
        yield Case("attention", "any", name, {}, unavailable("needs cuda"))


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


def _ceiling(shape: AttentionShape, batch: int, dtype: str, backend: SDPBackend, settings: Settings) -> Row:
    # As in a channels-last network: q, k and v are strided views of one [N, S, 3, heads, d] projection.
    size = (batch, shape.tokens, 3, shape.heads, shape.head_dim)
    packed = torch.randn(size, device=settings.device, dtype=DTYPES[dtype])
    q, k, v = (packed[:, :, i].transpose(1, 2) for i in range(3))  # [N, heads, S, d]
    try:
        with warnings.catch_warnings(record=True) as caught_warnings, torch.inference_mode():
            warnings.simplefilter("always")
            _sdpa(backend, q[:1], k[:1], v[:1])
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError, ValueError) as error:
        reasons = [
            first_line(error),
            *(first_line(w.message) for w in caught_warnings if isinstance(w.message, Warning)),
        ]
        raise Unavailable("; ".join(dict.fromkeys(reasons))[:500]) from error
    ref = _sdpa(SDPBackend.MATH, q.float(), k.float(), v.float())
    return measure_call(
        lambda: _sdpa(backend, q, k, v),
        settings,
        small_call=(lambda: _sdpa(backend, q[:1], k[:1], v[:1]), batch),
        check=lambda out: check_error(out, ref, _limit(dtype, shape.tokens)),
        flop=batch * shape.flop,
        nbytes=4 * q.nbytes,
    )


def kernels(settings: Settings) -> Iterator[Case]:
    """Yield every implementation on packed qkv at every shape, values and the gradient in qkv."""
    from bench.ops.providers import our_implementations

    names = [*our_implementations("attention", settings.device), "reference"]
    for _, shape, models, batch, dtype in _grid(settings):
        for name in names:
            for kind in ("attention", "attention_grad"):
                measure = partial(_attention, shape, batch, dtype, name, kind == "attention_grad")
                yield Case(kind, dtype, name, _fields(shape, batch), measure, {"models": models})


def _attention(
    shape: AttentionShape, batch: int, dtype: str, impl: str, gradient: bool, settings: Settings
) -> Row:
    from admfast.ops import attention, attention_ref

    width, limit = 3 * shape.heads * shape.head_dim, _limit(dtype, shape.tokens)
    qkv = torch.randn(batch, shape.tokens, width, device=settings.device).to(DTYPES[dtype])
    wide = qkv[:1].float().requires_grad_(True)
    ref = attention_ref(wide, shape.heads)
    if not gradient:
        return measure_call(
            lambda: attention(qkv, shape.heads, impl=impl),
            settings,
            small_call=(lambda: attention(qkv[:1], shape.heads, impl=impl), batch),
            check=lambda out: check_error(out[:1], ref, limit),
            flop=batch * shape.flop,
        )
    leaf = qkv.requires_grad_(True)
    out = attention(leaf, shape.heads, impl=impl)
    dy = torch.randn_like(out)
    (expected,) = torch.autograd.grad(ref, wide, dy[:1].float())
    return measure_call(
        lambda: torch.autograd.grad(out, leaf, dy, retain_graph=True)[0],
        settings,
        # The gradient needs three more products.
        check=lambda dqkv: check_error(dqkv[:1], expected, 4 * limit),
        flop=2.5 * batch * shape.flop,
        gradient=True,
    )
