"""`attention` on the qkv product: every implementation that this machine has."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from admfast.ops import attention, attention_ref
from bench.case import DTYPES, Case, Measure, Settings, checked, product_limit, timed
from bench.ceilings.attention import PRECISIONS
from bench.kernels.providers import ours
from bench.registry import ATTENTION_SHAPES, BATCHES, AttentionShape
from bench.results import Row


def cases(settings: Settings) -> Iterator[Case]:
    """Every implementation at every shape, values and the gradient in qkv."""
    shapes = ATTENTION_SHAPES[2:3] if settings.quick else ATTENTION_SHAPES
    batches: tuple[int, ...] = BATCHES[settings.device.type][: 1 if settings.quick else None]
    precisions: tuple[str, ...] = PRECISIONS[settings.device.type][: 1 if settings.quick else None]
    names = [*ours("attention", settings.device), "reference"]
    for batch in batches:
        for dtype in precisions:
            for shape in shapes:
                sizes = {
                    "batch": batch,
                    "tokens": shape.tokens,
                    "heads": shape.heads,
                    "head_dim": shape.head_dim,
                }
                for name in names:
                    for kind, gradient in (("attention", False), ("attention_grad", True)):
                        measure = _attention(shape, batch, dtype, name, gradient)
                        yield Case(kind, dtype, name, sizes, measure, {"models": shape.model})


def _attention(shape: AttentionShape, batch: int, dtype: str, impl: str, gradient: bool) -> Measure:
    def measure(settings: Settings) -> Row:
        width = 3 * shape.heads * shape.head_dim
        qkv = torch.randn(batch, shape.tokens, width, device=settings.device).to(DTYPES[dtype])
        leaf = qkv.requires_grad_(True)
        out = attention(leaf, shape.heads, impl=impl)
        wide = qkv.detach()[:1].float().requires_grad_(True)
        ref = attention_ref(wide, shape.heads)
        # Scores of a few units, weights and output are each rounded to the dtype by some backend.
        limit = 3 * torch.finfo(DTYPES[dtype]).eps + product_limit(dtype, shape.tokens)
        error = checked(out[:1], ref, limit)
        dy = torch.randn_like(out)
        if not gradient:
            with torch.inference_mode():
                given = qkv.detach()
                return timed(
                    lambda: attention(given, shape.heads, impl=impl),
                    settings,
                    flop=batch * shape.flop,
                    rel_err=error,
                )
        (expected,) = torch.autograd.grad(ref, wide, dy[:1].float())
        (dqkv,) = torch.autograd.grad(out, leaf, dy, retain_graph=True)
        # The gradient goes through three more products.
        error = checked(dqkv[:1], expected, 4 * limit)
        return timed(
            lambda: torch.autograd.grad(out, leaf, dy, retain_graph=True),
            settings,
            flop=2.5 * batch * shape.flop,
            rel_err=error,
        )

    return measure
