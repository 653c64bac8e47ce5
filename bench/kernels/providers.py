"""Who is measured beside whom: this package's own implementations, other libraries, and a copy."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from admfast.errors import Unavailable as Refused
from admfast.ops import TABLES
from bench.case import Case, Settings, Unavailable, first_line, timed
from bench.results import Row
from bench.runner import Cases

# Of an op's implementations those that never run on a kind of device.
ELSEWHERE = {"cuda": {"reference", "cpp"}, "cpu": {"reference", "cuda", "triton"}}


def ours(op: str, device: torch.device) -> list[str]:
    """The implementations of an op that are there for a device, less the reference."""
    return [
        entry.name
        for entry in TABLES[op].implementations
        if entry.name not in ELSEWHERE[device.type] and entry.available() is None
    ]


def with_reasons(cases: Cases) -> Cases:
    """The same cases; what an implementation refuses by name becomes a row's reason."""

    def measured(case: Case, settings: Settings) -> Row:
        try:
            return case.measure(settings)
        except Refused as error:
            raise Unavailable(first_line(error)) from error

    def wrapped(settings: Settings) -> Iterator[Case]:
        for case in cases(settings):
            yield dataclasses.replace(case, measure=functools.partial(measured, case))

    return wrapped


def copy_row(nbytes: float, settings: Settings) -> Row:
    """A device copy that moves as many bytes: what the memory can do at this size."""
    source = torch.randint(0, 100, (int(nbytes / 2),), dtype=torch.uint8, device=settings.device)
    target = torch.empty_like(source)
    return timed(lambda: target.copy_(source), settings, nbytes=2 * source.numel())


def apex_norm(groups: int, eps: float) -> Callable[..., torch.Tensor]:
    """apex's channels-last GroupNorm + SiLU as a function of x, weight and bias.

    Raises Unavailable where apex isn't there; so does a call with channels that it hands on to torch.
    """
    try:
        from apex.contrib.group_norm import GroupNorm  # type: ignore[import-not-found]
    except (ImportError, RuntimeError, OSError) as error:
        raise Unavailable(f"apex: {first_line(error)}") from error
    layers: list[Any] = []

    def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        if not layers:
            channels = x.shape[1]
            if channels not in getattr(GroupNorm, "SUPPORTED_CHANNELS", (channels,)):
                raise Unavailable(f"apex: no kernel for {channels} channels, it calls torch's")
            layers.append(GroupNorm(groups, channels, eps, device=x.device, dtype=x.dtype, act="silu"))
            layers[0].weight.data.copy_(weight)
            layers[0].bias.data.copy_(bias)
        return layers[0](x)

    return run


def liger_norm(groups: int, eps: float) -> Callable[..., torch.Tensor]:
    """Liger's GroupNorm, which has neither SiLU nor channels-last: what it takes to use it is counted in.

    Raises Unavailable where Liger isn't there.
    """
    try:
        from liger_kernel.ops.group_norm import (  # type: ignore[import-not-found]
            LigerGroupNormFunction,
        )
    except (ImportError, RuntimeError, OSError) as error:
        raise Unavailable(f"liger: {first_line(error)}") from error

    def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        y = LigerGroupNormFunction.apply(x.contiguous(), weight, bias, x.shape[1], groups, eps)
        return F.silu(y.contiguous(memory_format=torch.channels_last))

    return run
