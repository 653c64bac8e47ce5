"""`sampler_step`: one guided, learned-range DDPM update with its noise, beside the published operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from admfast.ops import Row, SamplerState, Stream, normal_ref, pack, sampler_step
from bench import results
from bench.case import DTYPES, Case, Measure, Settings, checked, timed
from bench.ceilings.sampler import STEPS, published_update, tables, update_ref64
from bench.kernels.providers import copy_row, ours
from bench.registry import BATCHES, SAMPLER_SIDES

STEP = STEPS // 2
# Thirty float32 roundings on the way to each element.
LIMIT = 30 * torch.finfo(torch.float32).eps


def cases(settings: Settings) -> Iterator[Case]:
    """Every image and batch size; on the CPU also the batch of eight that its target names.

    `dtype` is the network's output's: float32 lies channels-first, at 64 and 256 px also half precision,
    channels-last, as a network in that precision leaves it. The state is float32.
    """
    sides = SAMPLER_SIDES[:1] if settings.quick else SAMPLER_SIDES
    batches: tuple[int, ...] = BATCHES[settings.device.type][: 1 if settings.quick else None]
    sizes = [(batch, side) for batch in batches for side in sides]
    if not settings.cuda and not settings.quick:
        sizes.append((8, 256))
    half = "fp16" if settings.cuda else "bf16"
    for batch, side in sizes:
        for dtype in ("fp32", half) if side in (256, sides[0]) else ("fp32",):
            for provider in ("copy", "eager", "torch.compile", *ours("sampler_step", settings.device)):
                shape = {"batch": batch, "side": side}
                yield Case("sampler_step", dtype, provider, shape, _update(batch, side, dtype, provider))


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
        eps, v = out.float().chunk(2, dim=1)
        fraction = (v + 1) / 2
        log_variance = fraction * c["max_log"] + (1 - fraction) * c["min_log"]
        x_0 = (c["x_from_x"] * x - c["x_from_eps"] * eps).clamp(-1, 1)
        mean = c["mean_x0"] * x_0 + c["mean_x"] * x + torch.exp(log_variance) * gradient
        return mean + torch.exp(0.5 * log_variance) * (noise if given_noise else torch.randn_like(x))

    torch._dynamo.reset()
    return torch.compile(update, fullgraph=True, dynamic=False)


def _update(batch: int, side: int, dtype: str, provider: str) -> Measure:
    def measure(settings: Settings) -> results.Row:
        device = settings.device
        x, gradient = (torch.randn(batch, 3, side, side, device=device) for _ in range(2))
        out = torch.randn(batch, 6, side, side, device=device).to(DTYPES[dtype])
        if dtype != "fp32":
            out = out.contiguous(memory_format=torch.channels_last)
        # Read x, eps and variance, and gradient, write x and x_0: noise is made on the way.
        moved = 4 * x.nbytes + out.nbytes
        if provider == "copy":
            return copy_row(moved, settings)
        table = tables()

        def wrong_by(new: torch.Tensor, noise: torch.Tensor) -> float:
            return checked(new, update_ref64(x, out, gradient, noise, STEP, table), LIMIT)

        with torch.inference_mode():
            if provider == "eager":
                torch.manual_seed(0)
                new = published_update(x, out, gradient, STEP, table)
                torch.manual_seed(0)
                error = wrong_by(new, torch.randn_like(x))

                def run() -> object:
                    return published_update(x, out, gradient, STEP, table)

            elif provider == "torch.compile":
                # What it draws inside can't be drawn again outside: it is compared for given noise.
                noise = torch.randn_like(x)
                error = wrong_by(compiled_update(given_noise=True)(x, out, gradient, noise), noise)
                compiled = compiled_update(given_noise=False)

                def run() -> object:
                    return compiled(x, out, gradient, noise)

            else:
                rows = [guided_row()]
                packed, state = pack(rows, device=device), SamplerState.start(x, rows)
                seeds = torch.arange(batch, device=device)
                row = torch.zeros(1, dtype=torch.int64, device=device)

                def run() -> object:
                    return sampler_step(state, out, packed, row, grad=gradient, seeds=seeds, impl=provider)

                run()
                drawn = normal_ref(seeds, tuple(x.shape[1:]), 0, Stream.STEPS)
                error = wrong_by(state.x.clone(), drawn)

            return timed(run, settings, nbytes=moved, rel_err=error)

    return measure
