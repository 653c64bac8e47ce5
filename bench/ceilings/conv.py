"""3x3 and 1x1 convolutions at the shapes where the ADM models spend their operations."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from bench.case import (
    DTYPES,
    Case,
    Measure,
    Settings,
    checked,
    dtype_missing,
    first_line,
    float32_mode,
    fp8_product,
    product_limit,
    timed,
    unavailable,
)
from bench.registry import BATCHES, ConvShape, distinct_convs
from bench.results import Row

LAYOUTS = {"channels_last": torch.channels_last, "channels_first": torch.contiguous_format}
PRECISIONS = {"cuda": ("fp16", "bf16", "tf32", "fp32"), "cpu": ("fp32", "bf16", "fp16")}
# Settings are ranked by the places of batch, layout and precision in their lists; a rank above this is left
# out.
FARTHEST = {"cuda": 4, "cpu": 2}
# One call at the two CPUs' rate of these machines is then a third of a second: a row in two to three seconds.
CPU_FLOP_LIMIT = 50e9


def cases(settings: Settings) -> Iterator[Case]:
    """All shapes, the likeliest setting first: half precision, channels-last, the first batch size."""
    yield from _fp8_cases(settings)
    shapes = distinct_convs()
    batches, precisions = BATCHES[settings.device.type], PRECISIONS[settings.device.type]
    if settings.quick:
        shapes = [pair for pair in shapes if pair[0].flop < 2e9][:2]
        batches, precisions = batches[:1], precisions[:2]
    missing = {dtype: dtype_missing(dtype, settings) for dtype in precisions}
    for dtype, reason in missing.items():
        if reason:
            yield Case("conv3x3", dtype, "F.conv2d", {}, unavailable(reason))
    grid = [
        (b + f + d, shape, models, batch, layout, dtype)
        for b, batch in enumerate(batches)
        for f, layout in enumerate(LAYOUTS)
        for d, dtype in enumerate(precisions)
        for shape, models in shapes
        if b + f + d <= FARTHEST[settings.device.type] and not missing[dtype]
        if settings.cuda or shape.flop * batch <= CPU_FLOP_LIMIT
    ]
    for _, shape, models, batch, layout, dtype in sorted(grid, key=lambda row: row[0]):
        yield _case(shape, models, batch, layout, dtype, "F.conv2d", _conv(shape, batch, layout, dtype))
        if shape.kernel == 1 and layout == "channels_last":
            yield _case(shape, models, batch, layout, dtype, "torch.mm", _product(shape, batch, dtype))


def _case(
    shape: ConvShape, models: str, batch: int, layout: str, dtype: str, provider: str, measure: Measure
) -> Case:
    kernel, cin, cout, side = shape.size
    sizes = {"batch": batch, "cin": cin, "cout": cout, "side": side, "layout": layout}
    return Case(f"conv{kernel}x{kernel}", dtype, provider, sizes, measure, {"models": models})


def _fp8_cases(settings: Settings) -> Iterator[Case]:
    """fp8: a 1x1 convolution over channels-last pixels is a matrix product; 3x3 is what the library says."""
    small = torch.ones(1, 32, 8, 8, device=settings.device).to(DTYPES["fp8"])
    weight = torch.ones(32, 32, 3, 3, device=settings.device).to(DTYPES["fp8"])
    # A torch that can would need a reference for an output type not known today: named, not timed unchecked.
    reason = "this torch has an fp8 F.conv2d, which is not measured here"
    try:
        F.conv2d(small, weight, padding=1)
    except (RuntimeError, NotImplementedError) as error:
        reason = f"F.conv2d: {first_line(error)}"
    yield Case("conv3x3", "fp8", "F.conv2d", {}, unavailable(reason))
    reason = dtype_missing("fp8", settings)
    if reason:
        yield Case("conv1x1", "fp8", "_scaled_mm", {}, unavailable(reason))
        return
    ones = [pair for pair in distinct_convs() if pair[0].kernel == 1]
    batches = BATCHES[settings.device.type][:1]
    for shape, models in ones[:1] if settings.quick else ones:
        for batch in batches:
            if settings.cuda or shape.flop * batch <= CPU_FLOP_LIMIT:
                yield _case(
                    shape, models, batch, "channels_last", "fp8", "_scaled_mm", _product(shape, batch, "fp8")
                )


def _conv(shape: ConvShape, batch: int, layout: str, dtype: str) -> Measure:
    def measure(settings: Settings) -> Row:
        kernel, cin, cout, side = shape.size
        where, kind = settings.device, DTYPES[dtype]
        x = torch.randn(batch, cin, side, side, device=where, dtype=kind)
        x = x.contiguous(memory_format=LAYOUTS[layout])
        weight = torch.randn(cout, cin, kernel, kernel, device=where, dtype=kind) / (cin * kernel**2) ** 0.5
        weight = weight.contiguous(memory_format=LAYOUTS[layout])

        def run() -> torch.Tensor:
            return F.conv2d(x, weight, padding=kernel // 2)

        library = "oneDNN" if not settings.cuda else f"cuDNN {torch.backends.cudnn.version()}, benchmark on"
        with float32_mode(dtype), searching():
            error = _check(run(), x, weight, product_limit(dtype, cin * kernel**2))
            flop = batch * shape.flop
            return timed(
                run,
                settings,
                flop=flop,
                nbytes=_bytes(shape, batch, dtype),
                rel_err=error,
                implementation=library,
            )

    return measure


@contextlib.contextmanager
def searching() -> Iterator[None]:
    """Let cuDNN try its algorithms once per shape and keep the fastest.

    Not `torch.backends.cudnn.flags(benchmark=True)`: whatever that isn't told goes to its default, and
    `enabled` defaults to off.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _check(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, limit: float) -> float:
    """Compare the 4x4 pixels after the first of the first and the last image with a float64 convolution."""
    ends = [0, x.shape[0] - 1]
    border = weight.shape[-1] // 2
    patch = x[ends, :, 1 - border : 5 + border, 1 - border : 5 + border]
    ref = F.conv2d(patch.double().cpu(), weight.double().cpu())
    return checked(out[ends, :, 1:5, 1:5], ref, limit)


def _product(shape: ConvShape, batch: int, dtype: str) -> Measure:
    """A 1x1 convolution as the matrix product [N*H*W, cin] @ [cin, cout]."""

    def measure(settings: Settings) -> Row:
        _, cin, cout, side = shape.size
        x = torch.randn(batch * side**2, cin, device=settings.device).to(DTYPES[dtype])
        weight = (torch.randn(cout, cin, device=settings.device) / cin**0.5).to(DTYPES[dtype]).t()

        def run() -> torch.Tensor:
            return fp8_product(x, weight) if dtype == "fp8" else torch.mm(x, weight)

        with float32_mode(dtype):
            out = run()
            ref = x[-16:].double().cpu() @ weight.double().cpu()
            error = checked(out[-16:], ref, product_limit(dtype, cin, out.dtype))
            return timed(
                run, settings, flop=batch * shape.flop, nbytes=_bytes(shape, batch, dtype), rel_err=error
            )

    return measure


def _bytes(shape: ConvShape, batch: int, dtype: str) -> int:
    """Input, weight and output once each; an fp8 product writes bfloat16."""
    kernel, cin, cout, side = shape.size
    size = DTYPES[dtype].itemsize
    out_size = 2 if dtype == "fp8" else size
    return (batch * cin * side**2 + cin * cout * kernel**2) * size + batch * cout * side**2 * out_size
