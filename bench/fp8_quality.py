"""Measure what 3x3 convolutions of e4m3 numbers would do to the digits, by emulating their rounding.

`python -m bench.fp8_quality` samples the digits with float32 networks whose 3x3 convolutions, except the
first and the last, round their factors as a GPU's products in fp8 would: x to s e4m3(x / s) with
s = max |x| / 448 of each image, weights in the same way for each output channel. Sums are float32. It
compares the images with those of the unrounded networks, and does the same for the integers of
`admfast.ops.conv.int8` and for the precision bf16. With `--out`, it also writes the numbers as JSON, and for
each kind of samples a picture with a row for each rounding.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import admfast
from admfast.engine.options import PLAIN
from admfast.files.atomic import write_text
from admfast.files.images import write_grid
from admfast.files.levels import to_uint8
from admfast.ops import conv_int8_ref
from admfast.verify.budget import psnr
from bench.results import markdown_table

LARGEST_E4M3 = 448.0  # of the finite numbers of e4m3
Convolve = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def round_to_e4m3(x: Tensor) -> Tensor:
    """Round to e4m3 with one scale for each index of the first dimension."""
    scale = x.abs().amax(tuple(range(1, x.dim())), keepdim=True) / LARGEST_E4M3
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale


def fp8_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve factors that are rounded to e4m3."""
    return F.conv2d(round_to_e4m3(x), round_to_e4m3(weight), bias, padding=1)


CONVOLUTIONS: dict[str, Convolve] = {"8 bits": conv_int8_ref, "e4m3": fp8_conv}


def straight_through(convolve: Convolve, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve by `convolve`; the gradient is that of the convolution without its rounding."""
    exact = F.conv2d(x, weight, bias, padding=1)
    return exact + (convolve(x, weight, bias) - exact).detach()


@contextmanager
def replace_convolutions(pipe: admfast.Pipeline, convolve: Convolve) -> Iterator[None]:
    """Compute the inner 3x3 convolutions of both networks by `convolve` within the `with` block."""
    layers: list[Any] = [
        module
        for net in (pipe.net, pipe.classifier)
        if net is not None
        for module in net.modules()
        if isinstance(module, torch.nn.Conv2d)
        and module.kernel_size == (3, 3)
        and min(module.weight.shape[:2]) > 3
    ]
    for layer in layers:
        layer._conv_forward = partial(straight_through, convolve)
    try:
        yield
    finally:
        for layer in layers:
            del layer._conv_forward


def samples(
    pipe: admfast.Pipeline, pipe_bf16: admfast.Pipeline, request: dict[str, Any]
) -> dict[str, Tensor]:
    """Return the images of one request by the name of the arithmetic; `pipe` computes in float32."""
    images = {"float32": pipe.sample(**request), "bf16": pipe_bf16.sample(**request)}
    for name, convolve in CONVOLUTIONS.items():
        with replace_convolutions(pipe, convolve):
            images[name] = pipe.sample(**request)
    return images


def draw(path: Path, images: dict[str, Tensor]) -> None:
    """Write a picture with a row for each arithmetic, the same seeds one below the other."""
    labels = [row for row, batch in enumerate(images.values()) for _ in batch]
    levels = torch.cat([to_uint8(batch) for batch in images.values()])
    write_grid(path, levels.numpy(), labels, list(images))


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table of the images' PSNR for each solver and rounding."""
    parser = argparse.ArgumentParser(prog="python -m bench.fp8_quality", description=__doc__)
    parser.add_argument("--count", type=int, default=16, help="images (default: %(default)d)")
    parser.add_argument("--steps", type=int, default=50, help="steps (default: %(default)d)")
    parser.add_argument("--out", type=Path, help="folder for fp8_quality.json and the pictures")
    args = parser.parse_args(argv)
    pipe = admfast.load("digits32", device="cpu", precision="fp32", engine=PLAIN)
    pipe_bf16 = admfast.load("digits32", device="cpu", precision="bf16")
    labels = [i % 10 for i in range(args.count)]
    rows = []
    for solver in ("ddpm", "ddim"):
        for guidance in (2.0, 0.0):
            request: dict[str, Any] = {"solver": solver, "steps": args.steps, "guidance": guidance}
            batch = {"seeds": range(args.count), "classes": labels, "output": "float"}
            images = samples(pipe, pipe_bf16, request | batch)
            decibels = {name: round(psnr(x, images["float32"]), 1) for name, x in images.items()}
            del decibels["float32"]
            rows.append(request | {"count": args.count, "psnr_db": decibels})
            if args.out:
                draw(args.out / f"fp8_quality_{solver}_guidance{guidance:g}.png", images)
    header = ("samples", *(f"{name}, dB" for name in rows[0]["psnr_db"]))
    names = [f"{row['solver']} {row['steps']}, guidance {row['guidance']:g}" for row in rows]
    lines = [(name, *row["psnr_db"].values()) for name, row in zip(names, rows, strict=True)]
    print(markdown_table(header, lines))
    if args.out:
        write_text(args.out / "fp8_quality.json", json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
