"""`sampler_step`: one guided, learned-range DDPM update with its noise, beside the published operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from admfast.ops import Row, SamplerState, pack, sampler_step
from bench import results
from bench.case import Case, Measure, Settings, checked, timed
from bench.ceilings.sampler import STEPS, published_update, tables, update_ref64
from bench.kernels.providers import copy_row, ours
from bench.registry import BATCHES, SAMPLER_SIDES

STEP = STEPS // 2
# Thirty float32 roundings on the way to each element.
LIMIT = 30 * torch.finfo(torch.float32).eps


def cases(settings: Settings) -> Iterator[Case]:
    """Every image and batch size; on the CPU also the batch of eight that its target names."""
    sides = SAMPLER_SIDES[:1] if settings.quick else SAMPLER_SIDES
    batches: tuple[int, ...] = BATCHES[settings.device.type][: 1 if settings.quick else None]
    sizes = [(batch, side) for batch in batches for side in sides]
    if not settings.cuda and not settings.quick:
        sizes.append((8, 256))
    for batch, side in sizes:
        for provider in ("copy", "eager", "torch.compile", *ours("sampler_step", settings.device)):
            shape = {"batch": batch, "side": side}
            yield Case("sampler_step", "fp32", provider, shape, _update(batch, side, provider))


def guided_row(step: int = STEP) -> Row:
    """The update of the published sampler at a step of its table, as one row."""
    c = {name: float(values[step]) for name, values in tables().items()}
    half = (c["max_log"] - c["min_log"]) / 2
    return Row(
        t_net=0.0,
        t_clf=0.0,
        k_x=c["x_from_x"],
        k_out=-c["x_from_eps"],
        l0=c["min_log"] + half,
        l1=half,
        a=c["mean_x"],
        b=c["mean_x0"],
        k_mean=1.0,
        k_z=1.0,
    )


def compiled_update(given_noise: bool) -> Callable[..., torch.Tensor]:
    """The arithmetic of the published update with its coefficients as numbers, by torch.compile.

    A function of (x, out, gradient, noise); the noise is used where `given_noise`, else drawn inside.
    """
    c = {name: float(values[STEP]) for name, values in tables().items()}

    def update(
        x: torch.Tensor, out: torch.Tensor, gradient: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        eps, v = out.chunk(2, dim=1)
        fraction = (v + 1) / 2
        log_variance = fraction * c["max_log"] + (1 - fraction) * c["min_log"]
        x_0 = (c["x_from_x"] * x - c["x_from_eps"] * eps).clamp(-1, 1)
        mean = c["mean_x0"] * x_0 + c["mean_x"] * x + torch.exp(log_variance) * gradient
        return mean + torch.exp(0.5 * log_variance) * (noise if given_noise else torch.randn_like(x))

    torch._dynamo.reset()
    return torch.compile(update, fullgraph=True, dynamic=False)


def _update(batch: int, side: int, provider: str) -> Measure:
    def measure(settings: Settings) -> results.Row:
        device = settings.device
        x, gradient = (torch.randn(batch, 3, side, side, device=device) for _ in range(2))
        out = torch.randn(batch, 6, side, side, device=device)
        # Read x, eps, variance and gradient, write x and x0: noise is made on the way.
        moved = 6 * x.nbytes
        if provider == "copy":
            return copy_row(moved, settings)
        noise, table = torch.randn_like(x), tables()
        ref = update_ref64(x, out, gradient, noise, STEP, table)
        with torch.inference_mode():
            if provider == "eager":
                torch.manual_seed(0)
                new = published_update(x, out, gradient, STEP, table)
                torch.manual_seed(0)
                ref = update_ref64(x, out, gradient, torch.randn_like(x), STEP, table)

                def run() -> object:
                    return published_update(x, out, gradient, STEP, table)

            elif provider == "torch.compile":
                new = compiled_update(given_noise=True)(x, out, gradient, noise)
                compiled = compiled_update(given_noise=False)

                def run() -> object:
                    return compiled(x, out, gradient, noise)

            else:
                rows = [guided_row()]
                packed, state = pack(rows, device=device), SamplerState.start(x, rows)
                sampler_step(state, out, packed, 0, grad=gradient, noise=noise, impl=provider)
                new = state.x.clone()
                seeds, row = (
                    torch.arange(batch, device=device),
                    torch.zeros(1, dtype=torch.int64, device=device),
                )

                def run() -> object:
                    return sampler_step(state, out, packed, row, grad=gradient, seeds=seeds, impl=provider)

            return timed(run, settings, nbytes=moved, rel_err=checked(new, ref, LIMIT))

    return measure
