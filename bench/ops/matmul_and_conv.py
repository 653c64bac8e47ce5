"""Measurements of matrix products and convolutions: the library's, and `FoldedConv` compared with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import (
    DTYPES,
    Case,
    Measure,
    Sample,
    Settings,
    check_error,
    compile_function,
    first_line,
    measure_call,
    numerics,
    product_limit,
    refuse_slow,
    sample,
    seconds_of,
    unavailable,
)
from bench.results import Row
from bench.shapes import BATCHES, CPU_FLOP_LIMIT, MATMUL_SIZES, ConvShape, distinct_convs

LAYOUTS = {"channels_last": torch.channels_last, "channels_first": torch.contiguous_format}
PRECISIONS = {"cuda": ("fp16", "bf16", "tf32", "fp32"), "cpu": ("fp32", "bf16", "fp16")}
KERNEL_PRECISIONS = {"cuda": ("fp16", "bf16", "tf32", "fp32"), "cpu": ("fp32", "bf16")}
# The rank of a setting is the sum of the positions of its batch, layout and precision in their lists.
# Settings with a higher rank than this are left out.
MAX_RANK = {"cuda": 4, "cpu": 2}
ROWS_COMPARED = 8  # a float64 product of all rows would take longer than the measurement
ROWS_TIMED_FIRST = 16  # rows of the small product that is timed before the whole one
COMPILED_ON_CPU = 6  # number of shapes that are compiled on a CPU, where each takes seconds
BETWEEN_ROUNDS = 2048  # side of the square product that is timed between the steps of contenders
PRODUCT_FLOP = 2 * BETWEEN_ROUNDS**3
PATCH_SIDE = 8  # side of the two opposite corners of the output that are compared


def dtype_missing(dtype: str, settings: Settings) -> str:
    """Say why products in `dtype` can't be measured on this device; "" if they can."""
    if dtype == "tf32":
        if not settings.cuda:
            return "tf32 is a mode of CUDA tensor cores"
        if torch.cuda.get_device_capability(settings.device) < (8, 0):
            return "tf32 needs compute capability 8.0"
    if dtype == "fp8":
        small = torch.ones(32, 32, device=settings.device).to(DTYPES["fp8"])
        try:
            fp8_product(small, small.t())
        except (RuntimeError, NotImplementedError, AttributeError) as error:
            return f"torch._scaled_mm: {first_line(error)}"
    return ""


def fp8_product(a: Tensor, b: Tensor, fast: bool = False) -> Tensor:
    """Return a @ b of two e4m3 matrices (b column-major) with unit scales, in bfloat16."""
    one = torch.ones((), device=a.device)
    return torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=fast)


def product_taker(dtype: str) -> Callable[[int], Sample]:
    """Return a function that times a number of square matrix products on the CPU, for `sample_in_turns`."""
    a, b = torch.randn(2, BETWEEN_ROUNDS, BETWEEN_ROUNDS).to(DTYPES[dtype])
    out = torch.mm(a, b)
    return partial(sample, lambda i: torch.mm(a, b, out=out))


def _product(m: int, k: int, n: int, dtype: str, fast: bool, nbytes: float | None, settings: Settings) -> Row:
    """Measure [m, k] @ [k, n], first on a few of the m rows, because fp8 may use scalar code for minutes."""
    a = torch.randn(m, k, device=settings.device).to(DTYPES[dtype])
    b = (torch.randn(n, k, device=settings.device) / k**0.5).to(DTYPES[dtype]).t()
    product = partial(fp8_product, fast=fast) if dtype == "fp8" else torch.mm

    def check(out: Tensor) -> float:
        rows = torch.linspace(0, m - 1, ROWS_COMPARED).long().to(a.device)
        # Indexing is not implemented for fp8; float32 represents its values exactly.
        ref = a.float()[rows].double().cpu() @ b.double().cpu()
        return check_error(out.float()[rows], ref, product_limit(dtype, k, out.dtype, fast=fast))

    small = (lambda: product(a[:ROWS_TIMED_FIRST], b), m / ROWS_TIMED_FIRST)
    row = measure_call(
        lambda: product(a, b), settings, check=check, flop=2 * m * k * n, nbytes=nbytes, small_call=small
    )
    return row | {"implementation": "cuBLAS" if settings.cuda else "oneDNN or MKL"}


def _with_numerics(dtype: str, measure: Measure) -> Measure:
    """Return `measure` with float32 products in tf32 if `dtype` is "tf32", else in full float32."""

    def run(settings: Settings) -> Row:
        with numerics(dtype):
            return measure(settings)

    return run


def matmul_ceilings(settings: Settings) -> Iterator[Case]:
    """Yield square products of every precision and size, or one row with the reason if it is missing."""
    for dtype in ("bf16", "fp16", "fp32", "tf32", "fp8"):
        reason = dtype_missing(dtype, settings)
        if reason:
            yield Case("matmul", dtype, "torch", {}, unavailable(reason))
            continue
        for n in (256,) if settings.quick else MATMUL_SIZES[settings.device.type]:
            name = "_scaled_mm" if dtype == "fp8" else "torch.mm"
            measure = _with_numerics(dtype, partial(_product, n, n, n, dtype, False, None))
            yield Case("matmul", dtype, name, {"n": n}, measure)
            if dtype == "fp8" and settings.cuda:
                name += ", fast accumulation"
                yield Case("matmul", dtype, name, {"n": n}, partial(_product, n, n, n, dtype, True, None))


def conv_ceilings(settings: Settings) -> Iterator[Case]:
    """Yield `F.conv2d` without bias, in order of likely use: first batch, channels-last, first precision."""
    yield from _fp8_ceilings(settings)
    shapes = distinct_convs()
    batches, precisions = settings.some(BATCHES), settings.some(PRECISIONS, 2)
    if settings.quick:
        shapes = [pair for pair in shapes if pair[0].flop < 2e9][:2]
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
        if b + f + d <= MAX_RANK[settings.device.type] and not missing[dtype]
        if settings.cuda or shape.flop * batch <= CPU_FLOP_LIMIT
    ]
    for _, shape, models, batch, layout, dtype in sorted(grid, key=lambda row: row[0]):
        yield _ceiling(shape, models, batch, layout, dtype, "F.conv2d")
        if shape.kernel == 1 and layout == "channels_last":
            yield _ceiling(shape, models, batch, layout, dtype, "torch.mm")


def _fp8_ceilings(settings: Settings) -> Iterator[Case]:
    """Yield fp8 convolutions: 1x1 as a matrix product over channels-last pixels; for 3x3 only the reason."""
    small = torch.ones(1, 32, 8, 8, device=settings.device).to(DTYPES["fp8"])
    weight = torch.ones(32, 32, 3, 3, device=settings.device).to(DTYPES["fp8"])
    # A later torch may support it, with an output dtype that isn't known today: say so, and don't time it
    # unchecked.
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
    ones, batch = [pair for pair in distinct_convs() if pair[0].kernel == 1], BATCHES[settings.device.type][0]
    for shape, models in ones[: 1 if settings.quick else None]:
        if settings.cuda or shape.flop * batch <= CPU_FLOP_LIMIT:
            yield _ceiling(shape, models, batch, "channels_last", "fp8", "_scaled_mm")


def _ceiling(shape: ConvShape, models: str, batch: int, layout: str, dtype: str, provider: str) -> Case:
    kernel, cin, cout, side = shape.size
    size, written = DTYPES[dtype].itemsize, 2 if dtype == "fp8" else DTYPES[dtype].itemsize
    # Input, weight and output count once each; an fp8 product writes bfloat16.
    nbytes = (batch * cin * side**2 + cin * cout * kernel**2) * size + batch * cout * side**2 * written
    measure = partial(_library_conv, shape, batch, layout, dtype, nbytes)
    if provider != "F.conv2d":
        measure = partial(_product, batch * side**2, cin, cout, dtype, False, nbytes)
    sizes = {"batch": batch, "cin": cin, "cout": cout, "side": side, "layout": layout}
    return Case(
        f"conv{kernel}x{kernel}", dtype, provider, sizes, _with_numerics(dtype, measure), {"models": models}
    )


def tensors(
    shape: ConvShape, batch: int, dtype: str, layout: torch.memory_format, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return input, weight and bias, scaled so that the output is of order one."""
    kernel, cin, cout, side = shape.size
    generator = torch.Generator(device).manual_seed(0)
    x, weight, bias = (
        torch.randn(size, generator=generator, device=device)
        for size in ((batch, cin, side, side), (cout, cin, kernel, kernel), (cout,))
    )
    weight = (weight / (cin * kernel**2) ** 0.5).to(DTYPES[dtype]).contiguous(memory_format=layout)
    return x.to(DTYPES[dtype]).contiguous(memory_format=layout), weight, bias.to(DTYPES[dtype])


def _library_conv(
    shape: ConvShape, batch: int, layout: str, dtype: str, nbytes: float, settings: Settings
) -> Row:
    x, weight, _ = tensors(shape, batch, dtype, LAYOUTS[layout], settings.device)
    part = x[:1, :, :PATCH_SIDE, :PATCH_SIDE]
    row = measure_call(
        lambda: F.conv2d(x, weight, padding=shape.kernel // 2),
        settings,
        small_call=(lambda: F.conv2d(part, weight, padding=shape.kernel // 2), x.numel() / part.numel()),
        check=lambda out: compare(out, x, weight, None, product_limit(dtype, weight[0].numel())),
        flop=batch * shape.flop,
        nbytes=nbytes,
    )
    cudnn = f"cuDNN {torch.backends.cudnn.version()}, benchmark on"
    return row | {"implementation": cudnn if settings.cuda else "oneDNN"}


def compare(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, limit: float) -> float:
    """Return the relative error of two corners of the first and the last image, compared in float64."""
    ends, border = [0, len(x) - 1], weight.shape[-1] // 2
    wide, offset = (None if t is None else t.detach().double().cpu() for t in (weight, bias))
    errors = []
    for corner in (slice(None, PATCH_SIDE + border), slice(-PATCH_SIDE - border, None)):
        patch = x.detach()[ends][:, :, corner, corner].double().cpu()
        inside = slice(None, PATCH_SIDE) if corner.start is None else slice(-PATCH_SIDE, None)
        ref = F.conv2d(patch, wide, offset, padding=border)[:, :, inside, inside]
        errors.append(check_error(out[ends][:, :, inside, inside], ref, limit))
    return max(errors)


def conv_kernels(settings: Settings) -> Iterator[Case]:
    """Yield every shape and provider, values and the gradient in x; first precision and batch first."""
    shapes = [pair for pair in distinct_convs() if not settings.quick or pair[0].side == 16]
    batches = settings.some(BATCHES)
    for dtype in settings.some(KERNEL_PRECISIONS):
        for batch in batches:
            for index, (shape, models) in enumerate(shapes):
                if not settings.cuda and shape.flop * batch > CPU_FLOP_LIMIT:
                    continue
                sizes = {"batch": batch, "kernel": shape.kernel, "cin": shape.cin, "cout": shape.cout}
                sizes["side"] = shape.side
                names = [
                    "eager",
                    "eager channels-first",
                    *_our_implementations(shape, batch, dtype, settings),
                ]
                if settings.cuda or (index < COMPILED_ON_CPU and batch == batches[0]):
                    names.insert(2, "torch.compile")
                for name in names:
                    for kind in ("conv", "conv_grad"):
                        measure = partial(_conv, shape, batch, dtype, name, kind == "conv_grad")
                        yield Case(
                            kind, dtype, name, sizes, _with_numerics(dtype, measure), {"models": models}
                        )


def _our_implementations(shape: ConvShape, batch: int, dtype: str, settings: Settings) -> list[str]:
    """Return our implementations that support the shape on this machine."""
    from admfast.ops import TABLES, FoldedConv

    weight = torch.empty(shape.cout, shape.cin, shape.kernel, shape.kernel, device="meta")
    conv = FoldedConv(weight, padding=shape.kernel // 2, dtype=DTYPES[dtype])
    # An empty tensor on the right device is enough to ask for support.
    x = torch.empty(batch, shape.cin, 0, 0, device=settings.device, dtype=DTYPES[dtype])
    return [
        entry.name
        for entry in TABLES["conv"].implementations
        if entry.name != "reference"
        and not (entry.reason_missing() or entry.reason_unsupported(conv.directions[0], x))
    ]


def _provider(name: str, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Return the function called `name`."""
    padding = weight.shape[-1] // 2
    if name in ("eager", "eager channels-first", "torch.compile"):

        def eager(x: Tensor) -> Tensor:
            return F.conv2d(x, weight, bias, padding=padding)

        return compile_function(eager) if name == "torch.compile" else eager
    from admfast.ops import FoldedConv

    return FoldedConv(weight, bias, padding=padding, dtype=dtype, impl=name)


def _conv(shape: ConvShape, batch: int, dtype: str, provider: str, gradient: bool, settings: Settings) -> Row:
    from admfast.ops.conv.winograd import amplification

    layout = torch.contiguous_format if provider == "eager channels-first" else torch.channels_last
    x, weight, bias = tensors(shape, batch, dtype, layout, settings.device)
    run = _provider(provider, weight, bias, DTYPES[dtype])
    growth = amplification()[1] if provider == "winograd" else 1.0
    limit = growth * product_limit(dtype, (shape.cout if gradient else shape.cin) * shape.kernel**2)
    flop = batch * shape.flop
    part = x[:1, :, :PATCH_SIDE, :PATCH_SIDE]
    # torch.compile would also compile for the part.
    small = None if provider == "torch.compile" else (lambda: run(part), x.numel() / part.numel())
    if not gradient:
        check = partial(compare, x=x, weight=weight, bias=bias, limit=limit)
        return measure_call(lambda: run(x), settings, check=check, flop=flop, small_call=small)
    if small:
        refuse_slow(small[1] * seconds_of(small[0]), settings.limit)
    leaf = x.requires_grad_(True)
    y = run(leaf)
    dy = torch.randn_like(y).contiguous(memory_format=layout)
    turned = weight.flip(2, 3).transpose(0, 1)
    return measure_call(
        lambda: torch.autograd.grad(y, leaf, dy, retain_graph=True)[0],
        settings,
        check=lambda dx: compare(dx, dy, turned, None, limit),
        flop=flop,
        gradient=True,
    )
