"""The published sampler's update between two evaluations of the networks: many small operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.case import Case, Measure, Settings, checked, timed
from bench.registry import BATCHES, SAMPLER_SIDES
from bench.results import Row

STEPS = 250  # respaced from 1000, as most published samples were


def cases(settings: Settings) -> Iterator[Case]:
    """One guided, learned-range DDPM update at every image size and batch size."""
    sides = SAMPLER_SIDES[:1] if settings.quick else SAMPLER_SIDES
    for batch in BATCHES[settings.device.type][: 1 if settings.quick else None]:
        for side in sides:
            yield Case("sampler", "fp32", "eager", {"batch": batch, "side": side}, _update(batch, side))


def tables(steps: int = STEPS) -> dict[str, np.ndarray]:
    """The float64 coefficient tables of the linear 1000-step schedule, every 1000/steps-th step kept."""
    alpha_bar = np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000))[:: 1000 // steps]
    before = np.append(1.0, alpha_bar[:-1])
    betas = 1.0 - alpha_bar / before
    variance = betas * (1.0 - before) / (1.0 - alpha_bar)
    return {
        "min_log": np.log(np.append(variance[1], variance[1:])),
        "max_log": np.log(betas),
        "variance": variance,
        "timestep": np.arange(1000)[:: 1000 // steps],
        "x_from_x": np.sqrt(1.0 / alpha_bar),
        "x_from_eps": np.sqrt(1.0 / alpha_bar - 1.0),
        "mean_x0": betas * np.sqrt(before) / (1.0 - alpha_bar),
        "mean_x": (1.0 - before) * np.sqrt(1.0 - betas) / (1.0 - alpha_bar),
    }


def published_update(
    x: torch.Tensor, out: torch.Tensor, gradient: torch.Tensor, step: int, table: dict[str, np.ndarray]
) -> torch.Tensor:
    """x_{t-1} of guided ancestral sampling, one torch operation for one of the published code's.

    Follows the order of `p_mean_variance`, `condition_mean` and `p_sample` in guided-diffusion's
    `gaussian_diffusion.py`, with what a step costs there beside the arithmetic: coefficient tables are
    uploaded again each time, timesteps mapped, and the posterior's own variance fetched without being used.

    Args:
        x: x_t, [N, 3, H, W], float32.
        out: the network's output, [N, 6, H, W]: eps and the variance channels.
        gradient: the classifier's gradient at x_t, before its scale, [N, 3, H, W].
        step: index into the respaced schedule.
        table: what `tables` returns.
    """
    t = torch.tensor([step] * x.shape[0], device=x.device)
    _ = torch.tensor(table["timestep"].tolist(), device=x.device)[t]

    def at(name: str) -> torch.Tensor:
        values = torch.from_numpy(table[name]).to(device=x.device)[t].float()
        return values[:, None, None, None].expand(x.shape)

    eps, v = torch.split(out.to(x.dtype), x.shape[1], dim=1)
    low, high = at("min_log"), at("max_log")
    fraction = (v + 1) / 2
    log_variance = fraction * high + (1 - fraction) * low
    variance = torch.exp(log_variance)
    x_0 = (at("x_from_x") * x - at("x_from_eps") * eps).clamp(-1, 1)
    mean = at("mean_x0") * x_0 + at("mean_x") * x
    _ = at("variance"), at("min_log")
    noise = torch.randn_like(x)
    not_last = (t != 0).float().view(-1, 1, 1, 1)
    mean = mean.float() + variance * (gradient * 1.0).float()
    return mean + not_last * torch.exp(0.5 * log_variance) * noise


def update_ref64(
    x: torch.Tensor,
    out: torch.Tensor,
    gradient: torch.Tensor,
    noise: torch.Tensor,
    step: int,
    table: dict[str, np.ndarray],
) -> torch.Tensor:
    """The same update as one formula in float64, for given noise."""
    c = {name: float(values[step]) for name, values in table.items()}
    eps, v = out.double().chunk(2, dim=1)
    log_variance = c["min_log"] + (v + 1) / 2 * (c["max_log"] - c["min_log"])
    x_0 = (c["x_from_x"] * x.double() - c["x_from_eps"] * eps).clamp(-1, 1)
    mean = c["mean_x0"] * x_0 + c["mean_x"] * x.double() + log_variance.exp() * gradient.double()
    return mean + (step != 0) * (log_variance / 2).exp() * noise.double()


class Traffic(TorchDispatchMode):
    """Counts the operations that do work and the bytes they read and write, expanded dimensions once."""

    # Reinterpretations that torch does not mark as views.
    FREE = frozenset({"aten::detach", "aten::lift_fresh", "aten::alias"})

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func` and count it unless it only makes a view."""
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func._schema.name not in self.FREE:
            self.operations += 1
            read = [a for a in args if isinstance(a, torch.Tensor)]
            if func._schema.name == "aten::randn_like":
                read = []
            written = [out] if isinstance(out, torch.Tensor) else []
            self.bytes += sum(_touched(a) for a in (*read, *written))
        return out


def _touched(x: torch.Tensor) -> int:
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride else 1
    return count * x.element_size()


def count_traffic(fn: Callable[[], object]) -> tuple[int, int]:
    """(operations, bytes) of one call of `fn`."""
    with Traffic() as traffic:
        fn()
    return traffic.operations, traffic.bytes


def _update(batch: int, side: int) -> Measure:
    def measure(settings: Settings) -> Row:
        table, step = tables(), STEPS // 2
        x, gradient = (torch.randn(batch, 3, side, side, device=settings.device) for _ in range(2))
        out = torch.randn(batch, 6, side, side, device=settings.device)

        def run() -> torch.Tensor:
            return published_update(x, out, gradient, step, table)

        with torch.inference_mode():
            torch.manual_seed(0)
            new = run()
            torch.manual_seed(0)
            ref = update_ref64(x, out, gradient, torch.randn_like(x), step, table)
            # Some thirty float32 roundings on the way to each element.
            error = checked(new, ref, 30 * torch.finfo(torch.float32).eps)
            operations, moved = count_traffic(run)
            row = timed(run, settings, nbytes=moved, rel_err=error)
        return row | {"operations": operations}

    return measure
