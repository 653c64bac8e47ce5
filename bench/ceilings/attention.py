"""Attention at ADM's token counts and head widths, through every backend that torch or xformers offers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.case import (
    DTYPES,
    Case,
    Measure,
    Settings,
    Unavailable,
    checked,
    first_line,
    product_limit,
    timed,
    unavailable,
)
from bench.registry import ATTENTION_SHAPES, BATCHES, AttentionShape
from bench.results import Row

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
CUDA_ONLY = ("cudnn", "efficient")
PRECISIONS = {"cuda": ("fp16", "bf16"), "cpu": ("bf16", "fp32")}

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def cases(settings: Settings) -> Iterator[Case]:
    """Every backend at every shape; where it refuses, its own words are the row's reason."""
    batches: tuple[int, ...] = BATCHES[settings.device.type]
    precisions: tuple[str, ...] = PRECISIONS[settings.device.type]
    shapes: tuple[AttentionShape, ...] = ATTENTION_SHAPES
    if settings.quick:
        shapes, batches, precisions = shapes[2:3], batches[:1], precisions[:1]
    sizes: dict[tuple[int, int, int], list[AttentionShape]] = {}
    for shape in shapes:
        sizes.setdefault((shape.tokens, shape.heads, shape.head_dim), []).append(shape)
    grid = [
        (b + d, same, batch, dtype)
        for b, batch in enumerate(batches)
        for d, dtype in enumerate(precisions)
        for same in sizes.values()
    ]
    xformers = _xformers()
    for _, same, batch, dtype in sorted(grid, key=lambda row: row[0]):
        shape = same[0]
        fields = {"batch": batch, "tokens": shape.tokens, "heads": shape.heads, "head_dim": shape.head_dim}
        note = {"models": ", ".join(s.model for s in same)}
        for name, backend in BACKENDS.items():
            if settings.cuda or name not in CUDA_ONLY:
                measure = _attention(shape, batch, dtype, _sdpa(backend))
                yield Case("attention", dtype, f"sdpa {name}", fields, measure, note)
        if not isinstance(xformers, str):
            yield Case(
                "attention", dtype, "xformers", fields, _attention(shape, batch, dtype, xformers), note
            )
    if not settings.cuda:
        for name in CUDA_ONLY:
            yield Case("attention", "any", f"sdpa {name}", {}, unavailable("needs cuda"))
    if isinstance(xformers, str):
        yield Case("attention", "any", "xformers", {}, unavailable(xformers))


def _sdpa(backend: SDPBackend) -> Attention:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return attention


def _xformers() -> Attention | str:
    """xformers' attention on [N, heads, S, d], or why there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from xformers.ops import memory_efficient_attention  # type: ignore[import-not-found]
    except (ImportError, RuntimeError, OSError) as error:
        return f"xformers: {first_line(error)}"

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = memory_efficient_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return out.transpose(1, 2)

    return attention


def _attention(shape: AttentionShape, batch: int, dtype: str, attention: Attention) -> Measure:
    def measure(settings: Settings) -> Row:
        # As a channels-last network holds them: one [N, S, 3, heads, d] projection, q, k and v strided views
        # of it.
        packed = torch.randn(
            batch, shape.tokens, 3, shape.heads, shape.head_dim, device=settings.device, dtype=DTYPES[dtype]
        )
        q, k, v = (packed[:, :, i].transpose(1, 2) for i in range(3))  # [N, heads, S, d]
        with torch.inference_mode():
            try:
                with warnings.catch_warnings(record=True) as said:
                    warnings.simplefilter("always")
                    out = attention(q, k, v)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError, ValueError) as error:
                reasons = [
                    first_line(error),
                    *(first_line(w.message) for w in said if isinstance(w.message, Warning)),
                ]
                raise Unavailable("; ".join(dict.fromkeys(reasons))[:500]) from error
            with sdpa_kernel(SDPBackend.MATH):
                ref = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
            # Scores of a few units, weights and output are each rounded to the dtype by some backend.
            limit = 3 * torch.finfo(DTYPES[dtype]).eps + product_limit(dtype, shape.tokens)
            distance = checked(out, ref, limit)
            return timed(
                lambda: attention(q, k, v),
                settings,
                flop=batch * shape.flop,
                nbytes=batch * shape.elements * DTYPES[dtype].itemsize,
                rel_err=distance,
            )

    return measure
