"""Diffusion posterior sampling (DPS, Chung et al. 2023): restore images from noisy measurements of them.

    python examples/dps.py --out restored.png

The command hides the middle of handwritten digits and lets the shipped model fill it in. `measure` may be any
differentiable function: the guide takes its gradient through the prediction of the network, whose parameters
are frozen.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import admfast
from admfast import guides
from admfast.files.images import write_grid
from admfast.sampling.pipeline import Pipeline
from admfast.solvers import ddim


def dps_sample(
    pipe: Pipeline,
    measure: Callable[[Tensor], Tensor],
    y: Tensor,
    seeds: Sequence[int],
    classes: Sequence[int] | None = None,
    steps: int = 100,
    step_size: float = 1.0,
) -> Tensor:
    """Return samples x with measure(x) close to y: float32 [N, C, H, W], one image per seed.

    Source: algorithm 1 of the paper. Its step from the clipped x_0 equals that of DDIM with eta = 1.
    """
    guide = guides.by_measurement(pipe.process(str(steps)), measure, y, step_size)
    return pipe.sample(
        classes,
        seeds,
        solver=ddim(eta=1.0),
        respacing=str(steps),
        guides=guide,
        output="float",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Fill in the hidden middle of handwritten digits.")
    parser.add_argument("--out", type=Path, default=Path("restored.png"), help="the picture (restored.png)")
    parser.add_argument("--steps", type=int, default=100, help="network evaluations per image (100)")
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
    print(f"{arguments.out.resolve()}: originals, measurements, restored images")


if __name__ == "__main__":
    main()
