"""GroupNorm + SiLU, eager and compiled: what a fused kernel has to beat."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from bench.case import DTYPES, Case, Measure, Settings, checked, product_limit, timed
from bench.ceilings.conv import LAYOUTS
from bench.registry import BATCHES, GROUPS, NORM_SHAPES, NormShape
from bench.results import Row

PRECISIONS = {"cuda": ("fp16", "bf16"), "cpu": ("bf16", "fp32")}
PROVIDERS = ("eager", "torch.compile")


def cases(settings: Settings) -> Iterator[Case]:
    """Everything eager first: a compilation costs seconds, an eager row milliseconds."""
    shapes = NORM_SHAPES if settings.cuda else tuple(s for s in NORM_SHAPES if s.side <= 128)
    batches: tuple[int, ...] = BATCHES[settings.device.type]
    precisions: tuple[str, ...] = PRECISIONS[settings.device.type]
    providers: tuple[str, ...] = PROVIDERS
    if settings.quick:
        shapes, batches, precisions, providers = shapes[:1], batches[:1], precisions[:1], PROVIDERS[:1]
    grid = [
        (10 * p + b + d, shape, batch, layout, dtype, provider)
        for p, provider in enumerate(providers)
        for b, batch in enumerate(batches)
        for d, dtype in enumerate(precisions)
        for layout in LAYOUTS
        for shape in shapes
        # A compilation takes seconds: on a GPU one precision of every batch, on a CPU one batch of each.
        if provider == "eager" or (d if settings.cuda else b) == 0
    ]
    for _, shape, batch, layout, dtype, provider in sorted(grid, key=lambda row: row[0]):
        sizes = {"batch": batch, "channels": shape.channels, "side": shape.side, "layout": layout}
        note = {"models": shape.model}
        yield Case(
            "groupnorm_silu", dtype, provider, sizes, _norm(shape, batch, layout, dtype, provider), note
        )


def groupnorm_silu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """SiLU(GroupNorm(x)) in 32 groups, eps 1e-5, as the ADM networks write it."""
    return F.silu(F.group_norm(x, GROUPS, weight, bias, 1e-5))


def _norm(shape: NormShape, batch: int, layout: str, dtype: str, provider: str) -> Measure:
    def measure(settings: Settings) -> Row:
        kind = DTYPES[dtype]
        x = torch.randn(batch, shape.channels, shape.side, shape.side, device=settings.device, dtype=kind)
        x = x.contiguous(memory_format=LAYOUTS[layout])
        weight = (1 + 0.1 * torch.randn(shape.channels, device=settings.device)).to(kind)
        bias = (0.1 * torch.randn(shape.channels, device=settings.device)).to(kind)
        fn = groupnorm_silu
        if provider == "torch.compile":
            # Dynamo counts recompilations per function and gives up at the ninth shape.
            torch._dynamo.reset()
            fn = torch.compile(groupnorm_silu, fullgraph=True, dynamic=False)
        with torch.inference_mode():
            out = fn(x, weight, bias)
            ends = [0, batch - 1]
            ref = groupnorm_silu(x[ends].double(), weight.double(), bias.double())
            # Value and activation are rounded once each to the dtype; mean and variance sum over a group.
            length = shape.channels // GROUPS * shape.side**2
            error = checked(out[ends], ref, product_limit(dtype, length))
            del ref
            # Statistics have to be known before the first output: read twice, written once.
            row = timed(
                lambda: fn(x, weight, bias), settings, nbytes=3 * x.numel() * x.element_size(), rel_err=error
            )
        kept = out.is_contiguous(memory_format=LAYOUTS[layout])
        row["output_layout"] = layout if kept else "changed"
        return row

    return measure
