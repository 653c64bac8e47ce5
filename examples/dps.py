"""Diffusion posterior sampling (Chung et al. 2023): restore images from noisy measurements of them.

    python examples/dps.py --out restored.png

hides the middle of handwritten digits and lets the shipped model fill it in. Any differentiable `measure`
serves: `pipe.predict` is differentiated through, with the parameters frozen.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import admfast
from admfast.files.images import write_grid
from admfast.ops.noise import Stream, as_seeds, normal
from admfast.pipeline import Pipeline


def dps_sample(
    pipe: Pipeline,
    measure: Callable[[Tensor], Tensor],
    y: Tensor,
    seeds: Sequence[int],
    classes: Sequence[int] | None = None,
    steps: int = 100,
    step_size: float = 1.0,
) -> Tensor:
    """Sample x with measure(x) near y: float32 [N, C, H, W], one image a seed.

    Algorithm 1 of the paper: a DDPM step from the limited x_0, then a step of length `step_size` down the
    gradient in x_t of ||y - measure(x_0(x_t))||, for every image by itself.
    """
    process, config = pipe.process(str(steps)), pipe.config
    keys = as_seeds(list(seeds)).to(pipe.device)
    shape = (config.in_channels, *(config.image_size,) * config.dims)
    x = normal(keys, shape, 0, Stream.X_T)
    for row, i in enumerate(reversed(range(process.num_timesteps))):
        t = torch.full((len(keys),), i, device=x.device)
        x_t = x.detach().requires_grad_(True)
        x0 = pipe.predict(x_t, float(process.schedule.timestep_map[i]), classes).x0
        residual = (y - measure(x0)).flatten(1).norm(dim=1)
        (gradient,) = torch.autograd.grad(residual.sum(), x_t)
        with torch.no_grad():
            posterior = process.q_posterior(x0.clamp(-1, 1), x_t, t)
            z = normal(keys, shape, row, Stream.STEPS)
            x = posterior.mean + posterior.variance.sqrt() * z - step_size * gradient
    return x


def main() -> None:
    parser = argparse.ArgumentParser(description="Fill in the hidden middle of handwritten digits.")
    parser.add_argument("--out", type=Path, default=Path("restored.png"), help="the picture (restored.png)")
    parser.add_argument("--steps", type=int, default=100, help="network evaluations an image (100)")
    arguments = parser.parse_args()
    pipe = admfast.load("digits32")
    digits = list(range(10))
    clean = pipe.sample(digits, [100 + d for d in digits], output="float")
    mask = torch.ones_like(clean[:1])
    mask[..., 10:22, 10:22] = 0
    y = mask * clean
    restored = dps_sample(pipe, lambda x: mask * x, y, digits, digits, arguments.steps, step_size=0.5)
    levels = ((torch.cat([clean, y, restored]).clamp(-1, 1) + 1) * 127.5).byte().movedim(1, -1).cpu().numpy()
    rows = [row for row in range(3) for _ in digits]
    write_grid(arguments.out, levels, rows, ["original", "measured", "restored"], columns=len(digits))
    print(f"{arguments.out.resolve()}: originals, what was measured, restored")


if __name__ == "__main__":
    main()
