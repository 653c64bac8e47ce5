"""Measurements of the sampler's update between network evaluations: published operations, `sampler_step`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.measure import DTYPES, Case, Settings, check_error, compile_function, measure_call
from bench.ops.providers import measure_copy, our_implementations
from bench.results import Row
from bench.shapes import BATCHES, sampler_sides

if TYPE_CHECKING:
    from admfast.ops import Row as SolverRow

STEPS = 250  # respaced from 1000, as for most published samples
MEASURED_STEP = STEPS // 2
# Each element goes through about thirty float32 roundings.
LIMIT = 30 * torch.finfo(torch.float32).eps


def tables(steps: int = STEPS) -> dict[str, np.ndarray]:
    """Return float64 coefficient arrays [steps] of the linear schedule, keeping every 1000/steps-th step."""
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
    x: Tensor, out: Tensor, gradient: Tensor, step: int, table: dict[str, np.ndarray]
) -> Tensor:
    """Return x_{t-1} of guided ancestral sampling, with the same torch operations as the published code.

    It follows `p_mean_variance`, `condition_mean` and `p_sample` in guided-diffusion's
    `gaussian_diffusion.py`, including the work beside the arithmetic: coefficient arrays are copied to the
    device at every step, timesteps are mapped, and the posterior's variance is fetched but not used.

    Args:
        x: x_t, [N, 3, H, W], float32.
        out: the network's output, [N, 6, H, W]: eps and the variance channels.
        gradient: the classifier's gradient at x_t, before it is scaled, [N, 3, H, W].
        step: index into the respaced schedule.
        table: the result of `tables`.
    """
    t = torch.tensor([step] * x.shape[0], device=x.device)
    _ = torch.tensor(table["timestep"].tolist(), device=x.device)[t]

    def at(name: str) -> Tensor:
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


def coefficients(step: int, table: dict[str, np.ndarray]) -> dict[str, float]:
    """Return the coefficients of a step, and as `noise` 1, or 0 for step 0, which adds no noise."""
    return {name: float(values[step]) for name, values in table.items()} | {"noise": float(step != 0)}


def formula(x: Tensor, out: Tensor, gradient: Tensor, noise: Tensor, c: dict[str, float]) -> Tensor:
    """Compute the same update in the precision of x, with given noise and the coefficients of a step."""
    eps, v = out.to(x.dtype).chunk(2, dim=1)
    fraction = (v + 1) / 2
    log_variance = fraction * c["max_log"] + (1 - fraction) * c["min_log"]
    x_0 = (c["x_from_x"] * x - c["x_from_eps"] * eps).clamp(-1, 1)
    mean = c["mean_x0"] * x_0 + c["mean_x"] * x + log_variance.exp() * gradient
    return mean + c["noise"] * (0.5 * log_variance).exp() * noise


class Traffic(TorchDispatchMode):
    """Counter of operations other than views, and of the bytes they read and write (expanded ones once)."""

    # Operations that do no work but that torch does not mark as views.
    FREE = frozenset({"aten::detach", "aten::lift_fresh", "aten::alias"})

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func`, and count it unless it only makes a view."""
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func._schema.name not in self.FREE:
            self.operations += 1
            read = () if func._schema.name == "aten::randn_like" else args
            self.bytes += sum(_touched(a) for a in (*read, out) if isinstance(a, Tensor))
        return out


def _touched(x: Tensor) -> int:
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride else 1
    return count * x.element_size()


def count_traffic(fn: Callable[[], object]) -> tuple[int, int]:
    """Return (operations, bytes) of one call of `fn`."""
    with Traffic() as traffic:
        fn()
    return traffic.operations, traffic.bytes


def ceilings(settings: Settings) -> Iterator[Case]:
    """Yield one guided DDPM update with learned variance for every image size and batch size."""
    for batch in settings.some(BATCHES):
        for side in sampler_sides()[: 1 if settings.quick else None]:
            shape = {"batch": batch, "side": side}
            yield Case("sampler", "fp32", "eager", shape, partial(_update, batch, side, "fp32", "counted"))


def kernels(settings: Settings) -> Iterator[Case]:
    """Yield every image and batch size; on the CPU also batch 8 at 256 px.

    A case's `dtype` is that of the network's output: float32, channels-first; for the first size and 256 px
    also half precision, channels-last, as a network in that precision returns it. The state is float32.
    """
    sides = sampler_sides()[: 1 if settings.quick else None]
    sizes = [(batch, side) for batch in settings.some(BATCHES) for side in sides]
    if not settings.cuda and not settings.quick:
        sizes.append((8, 256))
    half = "fp16" if settings.cuda else "bf16"
    for batch, side in sizes:
        for dtype in ("fp32", half) if side in (256, sides[0]) else ("fp32",):
            for provider in (
                "copy",
                "eager",
                "torch.compile",
                *our_implementations("sampler_step", settings.device),
            ):
                measure = partial(_update, batch, side, dtype, provider)
                yield Case("sampler_step", dtype, provider, {"batch": batch, "side": side}, measure)


def guided_row(step: int = MEASURED_STEP) -> SolverRow:
    """Return the solver's row for the published update at a step of `tables`."""
    from admfast.diffusion import DiffusionConfig
    from admfast.solvers import ddpm

    process = DiffusionConfig(learn_sigma=True).build(f"ddim{STEPS}")  # every fourth step, as in `tables`
    return ddpm().table(process).rows[STEPS - 1 - step]


def _update(batch: int, side: int, dtype: str, provider: str, settings: Settings) -> Row:
    device = settings.device
    x, gradient = (torch.randn(batch, 3, side, side, device=device) for _ in range(2))
    out = torch.randn(batch, 6, side, side, device=device).to(DTYPES[dtype])
    if dtype != "fp32":
        out = out.contiguous(memory_format=torch.channels_last)
    # x, the network's output and the gradient are read, x and x_0 written; the noise is never in memory.
    moved = 4 * x.nbytes + out.nbytes
    if provider == "copy":
        return measure_copy(moved, settings)
    table = tables()
    c = coefficients(MEASURED_STEP, table)

    def check(new: Tensor, noise: Tensor) -> float:
        wide = (t.double() for t in (x, out, gradient, noise))
        return check_error(new, formula(*wide, c), LIMIT)

    def published() -> Tensor:
        return published_update(x, out, gradient, MEASURED_STEP, table)

    with torch.inference_mode():
        if provider in ("counted", "eager"):
            torch.manual_seed(0)
            new = published()
            torch.manual_seed(0)
            error = check(new, torch.randn_like(x))
            counted = count_traffic(published) if provider == "counted" else (None, moved)
            row = measure_call(published, settings, check=lambda _: error, nbytes=counted[1])
            return row if counted[0] is None else row | {"operations": counted[0]}
        if provider == "torch.compile":
            # Noise that is drawn inside can't be reproduced outside, so the comparison passes the noise in.
            noise = torch.randn_like(x)
            error = check(compile_function(lambda *a: formula(*a, c))(x, out, gradient, noise), noise)
            drawing = compile_function(lambda *a: formula(*a, torch.randn_like(a[0]), c))
            return measure_call(
                lambda: drawing(x, out, gradient), settings, check=lambda _: error, nbytes=moved
            )
    return _measure_ours(x, out, gradient, provider, check, moved, settings)


def _measure_ours(
    x: Tensor,
    out: Tensor,
    gradient: Tensor,
    impl: str,
    check: Callable[[Tensor, Tensor], float],
    moved: int,
    settings: Settings,
) -> Row:
    from admfast.ops import SamplerState, Stream, normal_ref, pack, sampler_step

    with torch.inference_mode():
        rows = [guided_row()]
        packed, state = pack(rows, device=x.device), SamplerState.start(x, rows)
        seeds = torch.arange(len(x), device=x.device)
        number = torch.zeros(1, dtype=torch.int64, device=x.device)
        drawn = normal_ref(seeds, tuple(x.shape[1:]), 0, Stream.STEPS)
        return measure_call(
            lambda: sampler_step(state, out, packed, number, grad=gradient, seeds=seeds, impl=impl),
            settings,
            check=lambda _: check(state.x.clone(), drawn),
            nbytes=moved,
        )
