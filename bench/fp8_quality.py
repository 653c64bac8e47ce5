"""Measure what 3x3 convolutions of e4m3 numbers would do to the digits, by emulating their rounding.

`python -m bench.fp8_quality` samples the digits with float32 networks whose 3x3 convolutions, except the
first and the last, round their factors as a GPU's products in fp8 would: x to s e4m3(x / s) with
s = max |x| / 448 of each image, weights in the same way for each output channel. Sums are float32. It
compares the images with those of the unrounded networks, and does the same for the integers of
`admfast.ops.conv.int8`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import admfast
from admfast.engine.options import PLAIN
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


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table of the images' PSNR for each solver and rounding."""
    parser = argparse.ArgumentParser(prog="python -m bench.fp8_quality", description=__doc__)
    parser.add_argument("--count", type=int, default=16, help="images (default: %(default)d)")
    parser.add_argument("--steps", type=int, default=50, help="steps (default: %(default)d)")
    args = parser.parse_args(argv)
    pipe = admfast.load("digits32", device="cpu", precision="fp32", engine=PLAIN)
    rows = []
    for solver in ("ddpm", "ddim"):
        for guidance in (2.0, 0.0):
            request: dict[str, Any] = dict(
                seeds=range(args.count), classes=[i % 10 for i in range(args.count)]
            )
            request |= dict(solver=solver, steps=args.steps, guidance=guidance, output="float")
            exact = pipe.sample(**request)
            cells = []
            for convolve in (fp8_conv, conv_int8_ref):
                with replace_convolutions(pipe, convolve):
                    cells.append(f"{psnr(pipe.sample(**request), exact):.1f}")
            rows.append((f"{solver} {args.steps}, guidance {guidance:g}", *cells))
    print(markdown_table(("samples", "e4m3, dB", "8 bits, dB"), rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
