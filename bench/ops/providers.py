"""This package's implementations of an op, and the copy that they are held against."""

from __future__ import annotations

import torch

from bench.measure import Settings, timed
from bench.results import Row

# Of an op's implementations those that never run on a kind of device.
ELSEWHERE = {"cuda": {"reference", "cpp"}, "cpu": {"reference", "cuda", "triton"}}


def ours(op: str, device: torch.device) -> list[str]:
    """Return the implementations of an op that a device has, less the reference."""
    from admfast.ops import TABLES

    return [
        entry.name
        for entry in TABLES[op].implementations
        if entry.name not in ELSEWHERE[device.type] and entry.available() is None
    ]


def copied(nbytes: float, settings: Settings) -> Row:
    """A device copy that moves as many bytes: what the memory can do at this size."""
    source = torch.randint(0, 100, (int(nbytes / 2),), dtype=torch.uint8, device=settings.device)
    target = torch.empty_like(source)
    return timed(lambda: target.copy_(source), settings, nbytes=2 * source.numel())
