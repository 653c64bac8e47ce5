"""Measurements of GroupNorm + SiLU, eager and compiled, and of `group_norm_silu` and its gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import DTYPES, Case, Settings, check_error, compile_function, measure_call, product_limit
from bench.ops.matmul_and_conv import LAYOUTS
from bench.ops.providers import measure_copy, our_implementations
from bench.results import Row
from bench.shapes import BATCHES, GROUPS, L2_BYTES, NormShape, norm_shapes

EPS = 1e-5
PRECISIONS = {"cuda": ("fp16", "bf16"), "cpu": ("bf16", "fp32")}
COMPILED_ON_CPU = 10  # number of shapes that are compiled on a CPU, where each takes seconds


def _shapes(settings: Settings) -> tuple[NormShape, ...]:
    if settings.quick:
        return norm_shapes()[7:8]
    return norm_shapes() if settings.cuda else tuple(s for s in norm_shapes() if s.side <= 128)


def ceilings(settings: Settings) -> Iterator[Case]:
    """Yield the eager cases first, because a compilation takes seconds and an eager row milliseconds."""
    grid = [
        (10 * p + b + d, shape, batch, layout, dtype, provider)
        for p, provider in enumerate(("eager", "torch.compile")[: 1 if settings.quick else None])
        for b, batch in enumerate(settings.some(BATCHES))
        for d, dtype in enumerate(settings.some(PRECISIONS))
        for layout in LAYOUTS
        for shape in _shapes(settings)
        # Compile few cases: on a GPU one precision at every batch, on a CPU one batch in every precision.
        if provider == "eager" or (d if settings.cuda else b) == 0
    ]
    for _, shape, batch, layout, dtype, provider in sorted(grid, key=lambda row: row[0]):
        sizes = {"batch": batch, "channels": shape.channels, "side": shape.side, "layout": layout}
        measure = partial(_ceiling, shape, batch, layout, dtype, provider)
        yield Case("groupnorm_silu", dtype, provider, sizes, measure, {"models": shape.model})


def _ceiling(shape: NormShape, batch: int, layout: str, dtype: str, provider: str, settings: Settings) -> Row:
    x, weight, bias, _ = inputs(shape, batch, dtype, "plain", settings.device, LAYOUTS[layout])
    run = provider_of(provider)
    # The norm's output and SiLU's are each rounded to the dtype; mean and variance sum over a group.
    limit = product_limit(dtype, shape.channels // GROUPS * shape.side**2)
    layout_kept = []

    def check(out: Tensor) -> float:
        layout_kept.append(out.is_contiguous(memory_format=LAYOUTS[layout]))
        return compare(out, x, weight, bias, {}, limit)

    # Statistics are needed before the first output, so x is read twice and y written once.
    row = measure_call(lambda: run(x, weight, bias), settings, check=check, nbytes=3 * x.nbytes)
    return row | {"output_layout": layout if layout_kept[0] else "changed"}


def kernels(settings: Settings) -> Iterator[Case]:
    """Yield the forward cases: plain, adaptive, resampled and from two sources."""
    batches, precisions = settings.some(BATCHES), settings.some(PRECISIONS)
    yield from _all_cases("group_norm_silu", settings)
    for shape in _shapes(settings)[:4]:
        for variant in ("up", "down", "two sources"):
            yield from _cases("group_norm_silu", shape, batches[0], precisions[0], variant, settings)


def gradient_kernels(settings: Settings) -> Iterator[Case]:
    """Yield the gradient in x with frozen parameters, which guidance needs at every step."""
    yield from _all_cases("group_norm_silu_grad", settings)


def _all_cases(kind: str, settings: Settings) -> Iterator[Case]:
    for batch in settings.some(BATCHES):
        for dtype in settings.some(PRECISIONS):
            for shape in _shapes(settings):
                for variant in ("plain", "adaptive"):
                    yield from _cases(kind, shape, batch, dtype, variant, settings)


def _cases(
    kind: str, shape: NormShape, batch: int, dtype: str, variant: str, settings: Settings
) -> Iterator[Case]:
    sizes = {"batch": batch, "channels": shape.channels, "side": shape.side, "variant": variant}
    providers = ["copy", "eager", *our_implementations("group_norm_silu", settings.device)]
    early = norm_shapes().index(shape) < COMPILED_ON_CPU and batch == 1
    if variant in ("plain", "adaptive") and (settings.cuda or early):
        providers.insert(2, "torch.compile")
    measure = _forward if kind == "group_norm_silu" else _gradient
    for provider in providers:
        call = partial(measure, shape, batch, dtype, variant, provider)
        yield Case(kind, dtype, provider, sizes, call, {"models": shape.model})


def inputs(
    shape: NormShape,
    batch: int,
    dtype: str,
    variant: str,
    device: torch.device,
    layout: torch.memory_format = torch.channels_last,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """Return x, weight, bias and the op's other arguments, all of order one."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device)

    def image(channels: int) -> Tensor:
        return (
            randn(batch, channels, shape.side, shape.side).to(DTYPES[dtype]).contiguous(memory_format=layout)
        )

    first = shape.channels * 2 // 3 // GROUPS * GROUPS if variant == "two sources" else shape.channels
    x, options = image(first), {}
    if variant == "two sources":
        options["x2"] = image(shape.channels - first)
    if variant == "adaptive":
        scale, shift = (0.1 * randn(batch, 2 * shape.channels)).to(DTYPES[dtype]).chunk(2, 1)
        options |= {"scale": scale, "shift": shift}
    if variant in ("up", "down"):
        options |= {"resample": variant, "with_skip": True}
    weight, bias = 1 + 0.1 * randn(shape.channels), 0.1 * randn(shape.channels)
    return x, weight.to(DTYPES[dtype]), bias.to(DTYPES[dtype]), options


def eager(x: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> Any:
    """Run the operations of the published network one by one; with float64 inputs this is the reference."""
    resample = options.get("resample")
    source = torch.cat([x, options["x2"]], 1) if "x2" in options else x
    y = F.group_norm(source, GROUPS, weight, bias, EPS)
    if "scale" in options:
        y = y * (1 + options["scale"][..., None, None]) + options["shift"][..., None, None]
    y = F.silu(y)
    if resample is None:
        return y
    if resample == "up":
        return F.interpolate(y, scale_factor=2.0), F.interpolate(source, scale_factor=2.0)
    return F.avg_pool2d(y, 2), F.avg_pool2d(source, 2)


def provider_of(name: str) -> Callable[..., Any]:
    """Return the function called `name`."""
    if name in ("eager", "torch.compile"):
        return eager if name == "eager" else compile_function(eager)
    from admfast.ops import group_norm_silu

    return lambda x, weight, bias, **options: group_norm_silu(
        x, weight, bias, GROUPS, EPS, impl=name, **options
    )


def _wide(x: Tensor, weight: Tensor, bias: Tensor, options: dict[str, Any]) -> tuple[Any, ...]:
    """Return the arguments for the first and the last image, in float64."""
    ends = [0, len(x) - 1]
    wide = {k: v[ends].double() if isinstance(v, Tensor) else v for k, v in options.items()}
    return x.detach()[ends].double(), weight.double(), bias.double(), wide


def compare(out: Any, x: Tensor, weight: Tensor, bias: Tensor, options: dict, limit: float) -> float:
    """Return the relative error of the first and the last image against the float64 reference."""
    *arguments, wide = _wide(x, weight, bias, options)
    ref = eager(*arguments, **wide)
    pairs = zip(out, ref, strict=True) if isinstance(out, tuple) else [(out, ref)]
    return max(check_error(a[[0, len(x) - 1]], b, limit) for a, b in pairs)


def _forward(
    shape: NormShape, batch: int, dtype: str, variant: str, provider: str, settings: Settings
) -> Row:
    x, weight, bias, options = inputs(shape, batch, dtype, variant, settings.device)
    source = x.nbytes + (options["x2"].nbytes if "x2" in options else 0)
    size = {"up": 4.0, "down": 0.25}.get(variant, 1.0) * source
    moved = source * (2 if source > L2_BYTES else 1) + size * (2 if "with_skip" in options else 1)
    if provider == "copy":
        return measure_copy(moved, settings)
    run = provider_of(provider)
    # The operations of the published network round at most five intermediate results to the dtype.
    limit = 5 * torch.finfo(x.dtype).eps
    return measure_call(
        lambda: run(x, weight, bias, **options),
        settings,
        check=lambda out: compare(out, x, weight, bias, options, limit),
        nbytes=moved,
    )


def _gradient(
    shape: NormShape, batch: int, dtype: str, variant: str, provider: str, settings: Settings
) -> Row:
    x, weight, bias, options = inputs(shape, batch, dtype, variant, settings.device)
    moved = x.nbytes * (5 if 2 * x.nbytes > L2_BYTES else 3)
    if provider == "copy":
        return measure_copy(moved, settings)
    dy, leaf = torch.randn_like(x), x.requires_grad_(True)
    y = provider_of(provider)(leaf, weight, bias, **options)
    ends = [0, batch - 1]
    x64, weight64, bias64, wide = _wide(x, weight, bias, options)
    leaf64 = x64.requires_grad_(True)
    (ref,) = torch.autograd.grad(eager(leaf64, weight64, bias64, **wide), leaf64, dy[ends].double())
    return measure_call(
        lambda: torch.autograd.grad(y, leaf, dy, retain_graph=True)[0],
        settings,
        check=lambda dx: check_error(dx[ends], ref, 8 * torch.finfo(x.dtype).eps),
        nbytes=moved,
        gradient=True,
    )
