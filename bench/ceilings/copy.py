"""Copies inside device memory: the bandwidth ceiling, above and below the size of the caches."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.case import Case, Measure, Settings, WrongResult, timed
from bench.registry import COPY_BYTES, MIB
from bench.results import Row
from bench.timing import captured

REPEATS = 20


def cases(settings: Settings) -> Iterator[Case]:
    """A copy of every size from flushed caches, and on a GPU the small ones again from a warm L2."""
    sizes = (MIB,) if settings.quick else COPY_BYTES[settings.device.type]
    for size in sorted(sizes, reverse=True):
        yield Case("copy", "fp32", "copy_", {"mib": size // MIB}, _copy(size))
    if settings.cuda:
        for size in (s for s in sizes if s <= 16 * MIB):
            yield Case(
                "copy_warm",
                "fp32",
                f"copy_ {REPEATS} times in a graph",
                {"mib": size // MIB},
                _warm_copy(size),
            )


def _copy(size: int) -> Measure:
    def measure(settings: Settings) -> Row:
        source, target = _pair(size, settings)
        target.copy_(source)
        if not torch.equal(source, target):
            raise WrongResult("the copy differs from its source")
        return timed(lambda: target.copy_(source), settings, nbytes=2 * size)

    return measure


def _warm_copy(size: int) -> Measure:
    def measure(settings: Settings) -> Row:
        source, target = _pair(size, settings)
        graph = captured(lambda: target.copy_(source), REPEATS)
        target.fill_(float("nan"))
        graph.replay()
        if not torch.equal(source, target):
            raise WrongResult("the captured copy differs from its source")
        return timed(graph.replay, settings, nbytes=2 * size * REPEATS)

    return measure


def _pair(size: int, settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.randn(size // 4, device=settings.device)
    return source, torch.full_like(source, float("nan"))
