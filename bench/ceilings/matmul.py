"""Square matrix products: the arithmetic ceiling of each precision."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.case import (
    DTYPES,
    Case,
    Measure,
    Settings,
    checked,
    dtype_missing,
    float32_mode,
    fp8_product,
    product_limit,
    timed,
    unavailable,
)
from bench.registry import MATMUL_SIZES
from bench.results import Row

CHECKED_ROWS = 8  # a float64 product of all rows would take longer than the measurement


def cases(settings: Settings) -> Iterator[Case]:
    """Every precision at every size; a precision that is not there is one row that says why."""
    sizes = (256,) if settings.quick else MATMUL_SIZES[settings.device.type]
    for dtype in ("bf16", "fp16", "fp32", "tf32", "fp8"):
        reason = dtype_missing(dtype, settings)
        if reason:
            yield Case("matmul", dtype, "torch", {}, unavailable(reason))
            continue
        for n in sizes:
            if dtype == "fp8":
                yield Case("matmul", dtype, "_scaled_mm", {"n": n}, _fp8(n, fast=False))
                if settings.cuda:
                    yield Case("matmul", dtype, "_scaled_mm, fast accumulation", {"n": n}, _fp8(n, fast=True))
            else:
                yield Case("matmul", dtype, "torch.mm", {"n": n}, _plain(n, dtype))


def _plain(n: int, dtype: str) -> Measure:
    def measure(settings: Settings) -> Row:
        a = torch.randn(n, n, device=settings.device).to(DTYPES[dtype])
        b = torch.randn(n, n, device=settings.device).to(DTYPES[dtype])
        out = torch.full_like(a, float("nan"))
        with float32_mode(dtype):
            torch.mm(a, b, out=out)
            error = _check(out, a, b, product_limit(dtype, n))
            return timed(
                lambda: torch.mm(a, b, out=out),
                settings,
                flop=2 * n**3,
                rel_err=error,
                implementation=_library(settings),
            )

    return measure


def _fp8(n: int, fast: bool) -> Measure:
    def measure(settings: Settings) -> Row:
        a = torch.randn(n, n, device=settings.device).to(DTYPES["fp8"])
        b = torch.randn(n, n, device=settings.device).to(DTYPES["fp8"]).t()
        error = _check(fp8_product(a, b, fast), a, b, product_limit("fp8", n, torch.bfloat16, fast=fast))
        return timed(
            lambda: fp8_product(a, b, fast),
            settings,
            flop=2 * n**3,
            rel_err=error,
            implementation=_library(settings),
        )

    return measure


def _check(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, limit: float) -> float:
    rows = torch.linspace(0, a.shape[0] - 1, CHECKED_ROWS).long().to(a.device)
    # Gathering is not implemented for fp8: float32 holds its values exactly.
    return checked(out.float()[rows], a.float()[rows].double().cpu() @ b.double().cpu(), limit)


def _library(settings: Settings) -> str:
    return "cuBLAS" if settings.cuda else "oneDNN or MKL"
