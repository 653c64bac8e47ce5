"""`adamw_ema_step_` on all parameters of a network: beside torch.optim.AdamW and an average after it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from admfast.checkpoints import network_shapes
from admfast.models.presets import preset
from admfast.ops import adamw_ema_step_, adamw_ema_step_ref_
from bench.case import Case, Measure, Settings, checked, timed
from bench.kernels.providers import copy_row, ours
from bench.registry import OPTIMISED
from bench.results import Row

# A large rate, so that what a step does to the weights is far above their rounding.
RATE, DECAY, SETTINGS = 1e-2, 0.9, {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
STEPS = 9.0  # taken before
# p, m, v and the average are each a sum of few terms; `foreach` rounds after every operation.
LIMIT = 8 * torch.finfo(torch.float32).eps
NAMES = ("p", "gradient", "m", "v", "average")


def cases(settings: Settings) -> Iterator[Case]:
    """Every provider on every network; with `quick` the first."""
    for model in OPTIMISED[settings.device.type][: 1 if settings.quick else None]:
        shapes = list(network_shapes(preset(model).config).values())
        sizes = {"model": model, "parameters": sum(math.prod(shape) for shape in shapes)}
        for provider in ("copy", "eager", "torch.optim", *ours("adamw_ema_step", settings.device)):
            yield Case("adamw_ema_step", "fp32", provider, sizes, _step(shapes, provider))


def lists_of(shapes: list[tuple[int, ...]], device: torch.device) -> list[list[Tensor]]:
    """Parameters, gradients, both moments and averages, of order one and above 0 where they must be."""
    generator = torch.Generator(device).manual_seed(0)
    lists: list[list[Tensor]] = [[] for _ in NAMES]
    for tensors in lists:
        tensors += [torch.randn(shape, generator=generator, device=device) for shape in shapes]
    for squares in lists[3]:
        squares.abs_()
    return lists


def taken_by(provider: str, lists: list[list[Tensor]]) -> Callable[[], None]:
    """One step on `lists` in place, as a function without arguments."""
    p, g, m, v, averages = lists
    if provider not in ("eager", "torch.optim"):
        step = torch.full((), STEPS, device=p[0].device)
        return lambda: adamw_ema_step_(p, g, m, v, [(averages, DECAY)], step, RATE, **SETTINGS, impl=provider)
    fused = provider == "torch.optim"
    optimiser = torch.optim.AdamW(p, lr=RATE, fused=fused, foreach=False, **SETTINGS)  # type: ignore[arg-type]
    for one, gradient, mean, square in zip(p, g, m, v, strict=True):
        one.grad = gradient
        step = torch.tensor(STEPS, device=one.device if fused else "cpu")
        optimiser.state[one] = {"step": step, "exp_avg": mean, "exp_avg_sq": square}

    @torch.no_grad()
    def take() -> None:
        optimiser.step()
        if fused:
            torch._foreach_lerp_(averages, p, 1 - DECAY)
            return
        for average, one in zip(averages, p, strict=True):  # as the published code does
            average.mul_(DECAY).add_(one, alpha=1 - DECAY)

    return take


def _step(shapes: list[tuple[int, ...]], provider: str) -> Measure:
    def measure(settings: Settings) -> Row:
        # Five are read and all but the gradient written, each once.
        moved = 9 * 4 * sum(math.prod(shape) for shape in shapes)
        if provider == "copy":
            return copy_row(moved, settings)
        lists = lists_of(shapes, settings.device)
        ends = [[ts[i].double() for i in (0, -1)] for ts in lists]
        step = torch.full((), STEPS, device=settings.device)
        adamw_ema_step_ref_(*ends[:4], [(ends[4], DECAY)], step, RATE, **SETTINGS)
        take = taken_by(provider, lists)
        take()
        errors = [
            checked(ts[i], ref[i], LIMIT)
            for ts, ref, name in zip(lists, ends, NAMES, strict=True)
            for i in (0, -1)
            if name != "gradient"
        ]
        return timed(take, settings, nbytes=moved, rel_err=max(errors))

    return measure
