"""`dynamic_threshold`: the percentile of every image by itself, beside torch.quantile."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from admfast.ops import dynamic_threshold, dynamic_threshold_ref
from bench.case import Case, Measure, Settings, Unavailable, checked, timed
from bench.kernels.providers import copy_row, ours
from bench.registry import BATCHES, L2_BYTES, SAMPLER_SIDES
from bench.results import Row

PERCENTILE = 0.995
QUANTILE_LIMIT = 1 << 24  # elements that torch.quantile takes
EPS = torch.finfo(torch.float32).eps
# The percentile, a clip and a division, each rounded once. torch.quantile also rounds the percentile's rank,
# which moves s by eps / (density s) of itself, and at s = 2.81 the density of |x0| is 0.0155.
LIMITS = {"eager": 4 * EPS + EPS / (0.0155 * 2.81)}


def cases(settings: Settings) -> Iterator[Case]:
    """Every provider at every image and batch size."""
    sides = SAMPLER_SIDES[:1] if settings.quick else SAMPLER_SIDES
    batches: tuple[int, ...] = BATCHES[settings.device.type][: 1 if settings.quick else None]
    for batch in batches:
        for side in sides:
            for provider in ("copy", "eager", *ours("dynamic_threshold", settings.device)):
                sizes = {"batch": batch, "side": side}
                yield Case("dynamic_threshold", "fp32", provider, sizes, _threshold(batch, side, provider))


def by_quantile(x0: torch.Tensor) -> torch.Tensor:
    """The formula with torch's own operations."""
    s = torch.quantile(x0.abs().flatten(1), PERCENTILE, dim=1).clamp(min=1)[:, None, None, None]
    return x0.clamp(-s, s) / s


def _threshold(batch: int, side: int, provider: str) -> Measure:
    def measure(settings: Settings) -> Row:
        x0 = torch.randn(batch, 3, side, side, device=settings.device)
        moved = x0.nbytes * (3 if x0.nbytes > L2_BYTES else 2)
        if provider == "copy":
            return copy_row(moved, settings)
        if provider == "eager" and x0.numel() > QUANTILE_LIMIT:
            raise Unavailable(f"torch.quantile takes {QUANTILE_LIMIT} elements, there are {x0.numel()}")

        def run() -> torch.Tensor:
            if provider == "eager":
                return by_quantile(x0)
            return dynamic_threshold(x0, PERCENTILE, impl=provider)

        truth = dynamic_threshold_ref(x0.double(), PERCENTILE)
        error = checked(run(), truth, LIMITS.get(provider, 4 * EPS))
        with torch.inference_mode():
            return timed(run, settings, nbytes=moved, rel_err=error)

    return measure
