"""This package's implementations of an op, and the copy with which they are compared."""

from __future__ import annotations

import torch

from bench.measure import Settings, measure_call
from bench.results import Row

# By device: implementations that are not measured there, the reference and those of other devices.
NOT_MEASURED_ON = {"cuda": {"reference", "cpp"}, "cpu": {"reference", "cuda", "triton"}}


def our_implementations(op: str, device: torch.device) -> list[str]:
    """Return the names of an op's implementations that can run on a device, without the reference."""
    from admfast.ops import TABLES

    return [
        entry.name
        for entry in TABLES[op].implementations
        if entry.name not in NOT_MEASURED_ON[device.type] and entry.reason_missing() is None
    ]


def measure_copy(nbytes: float, settings: Settings) -> Row:
    """Return the row of a device copy that moves `nbytes` bytes, as the bound by memory bandwidth."""
    source = torch.randint(0, 100, (int(nbytes / 2),), dtype=torch.uint8, device=settings.device)
    target = torch.empty_like(source)
    return measure_call(lambda: target.copy_(source), settings, nbytes=2 * source.numel())
