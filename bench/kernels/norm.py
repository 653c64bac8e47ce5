"""`group_norm_silu`, forward and input gradient: every implementation, eager, compiled, apex and Liger."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from admfast.ops import group_norm_silu, group_norm_silu_ref
from bench.case import DTYPES, Case, Measure, Settings, checked, timed
from bench.ceilings.norm import PRECISIONS
from bench.kernels.providers import apex_norm, copy_row, liger_norm, ours
from bench.registry import BATCHES, GROUPS, L2_BYTES, NORM_SHAPES, NormShape
from bench.results import Row

EPS = 1e-5
COMPILED_ON_CPU = 6  # shapes: a compilation takes seconds there


def forward_cases(settings: Settings) -> Iterator[Case]:
    """Values: plain, adaptive, resampled and from two sources."""
    for shape, batch, dtype, variant in _grid(settings):
        yield from _cases(settings, "group_norm_silu", shape, batch, dtype, variant, _forward)


def gradient_cases(settings: Settings) -> Iterator[Case]:
    """The gradient in x with frozen parameters, which guidance takes at every step."""
    for shape, batch, dtype, variant in _grid(settings):
        if variant in ("plain", "adaptive"):
            yield from _cases(settings, "group_norm_silu_grad", shape, batch, dtype, variant, _gradient)


def _grid(settings: Settings) -> Iterator[tuple[NormShape, int, str, str]]:
    shapes = NORM_SHAPES if settings.cuda else tuple(s for s in NORM_SHAPES if s.side <= 128)
    batches: tuple[int, ...] = BATCHES[settings.device.type]
    precisions: tuple[str, ...] = PRECISIONS[settings.device.type]
    if settings.quick:
        shapes, batches, precisions = shapes[7:8], batches[:1], precisions[:1]
    for batch in batches:
        for dtype in precisions:
            for shape in shapes:
                yield shape, batch, dtype, "plain"
                yield shape, batch, dtype, "adaptive"
    for shape in shapes[:4]:
        for variant in ("up", "down", "two sources"):
            yield shape, batches[0], precisions[0], variant


def _cases(
    settings: Settings,
    kind: str,
    shape: NormShape,
    batch: int,
    dtype: str,
    variant: str,
    measure: Callable[..., Measure],
) -> Iterator[Case]:
    sizes = {"batch": batch, "channels": shape.channels, "side": shape.side, "variant": variant}
    providers = ["copy", "eager", *ours("group_norm_silu", settings.device)]
    cheap = settings.cuda or (NORM_SHAPES.index(shape) < COMPILED_ON_CPU + 4 and batch == 1)
    if variant in ("plain", "adaptive") and cheap:
        providers.insert(2, "torch.compile")
    if settings.cuda and variant == "plain":
        providers += ["apex", "liger"]
    for provider in providers:
        yield Case(
            kind,
            dtype,
            provider,
            sizes,
            measure(shape, batch, dtype, variant, provider),
            {"models": shape.model},
        )


def inputs(
    shape: NormShape, batch: int, dtype: str, variant: str, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
    """x (channels-last), weight, bias and the op's other arguments, of order one."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator, device=device)

    first = shape.channels * 2 // 3 // GROUPS * GROUPS if variant == "two sources" else shape.channels
    x = randn(batch, first, shape.side, shape.side).to(DTYPES[dtype])
    x = x.contiguous(memory_format=torch.channels_last)
    options: dict[str, Any] = {}
    if variant == "two sources":
        x2 = randn(batch, shape.channels - first, shape.side, shape.side).to(DTYPES[dtype])
        options["x2"] = x2.contiguous(memory_format=torch.channels_last)
    if variant == "adaptive":
        scale, shift = (0.1 * randn(batch, 2 * shape.channels)).to(DTYPES[dtype]).chunk(2, 1)
        options |= {"scale": scale, "shift": shift}
    if variant in ("up", "down"):
        options |= {"resample": variant, "with_skip": True}
    weight, bias = 1 + 0.1 * randn(shape.channels), 0.1 * randn(shape.channels)
    return x, weight.to(DTYPES[dtype]), bias.to(DTYPES[dtype]), options


def eager(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, **options: Any) -> Any:
    """The operations of the published network, one by one."""
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
    """The function called `name`; raises Unavailable with the reason where it isn't there."""
    if name == "eager":
        return eager
    if name == "torch.compile":
        torch._dynamo.reset()  # Dynamo counts recompilations per function and gives up at the ninth shape
        return torch.compile(eager, fullgraph=True, dynamic=False)
    if name == "apex":
        return apex_norm(GROUPS, EPS)
    if name == "liger":
        return liger_norm(GROUPS, EPS)
    return lambda x, weight, bias, **options: group_norm_silu(
        x, weight, bias, GROUPS, EPS, impl=name, **options
    )


def _check(out: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, options: dict) -> float:
    """Relative error against the reference in float64, of the first and the last image."""
    ends = [0, len(x) - 1]
    wide = {k: v[ends].double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    ref = group_norm_silu_ref(x[ends].double(), weight.double(), bias.double(), GROUPS, EPS, **wide)
    pairs = zip(out, ref, strict=True) if isinstance(out, tuple) else [(out, ref)]
    # Every intermediate is rounded to the dtype by the operations of the published network: five at most.
    return max(checked(a[ends], b, 5 * torch.finfo(x.dtype).eps) for a, b in pairs)


def _forward(shape: NormShape, batch: int, dtype: str, variant: str, provider: str) -> Measure:
    def measure(settings: Settings) -> Row:
        x, weight, bias, options = inputs(shape, batch, dtype, variant, settings.device)
        source = x.nbytes + (options["x2"].nbytes if "x2" in options else 0)
        size = {"up": 4.0, "down": 0.25}.get(variant, 1.0) * source
        moved = source * (2 if source > L2_BYTES else 1) + size * (2 if "with_skip" in options else 1)
        if provider == "copy":
            return copy_row(moved, settings)
        with torch.inference_mode():
            run = provider_of(provider)
            error = _check(run(x, weight, bias, **options), x, weight, bias, options)
            return timed(lambda: run(x, weight, bias, **options), settings, nbytes=moved, rel_err=error)

    return measure


def _gradient(shape: NormShape, batch: int, dtype: str, variant: str, provider: str) -> Measure:
    def measure(settings: Settings) -> Row:
        x, weight, bias, options = inputs(shape, batch, dtype, variant, settings.device)
        moved = x.nbytes * (5 if 2 * x.nbytes > L2_BYTES else 3)
        if provider == "copy":
            return copy_row(moved, settings)
        dy, leaf = torch.randn_like(x), x.detach().requires_grad_(True)
        y = provider_of(provider)(leaf, weight, bias, **options)

        def run() -> torch.Tensor:
            return torch.autograd.grad(y, leaf, dy, retain_graph=True)[0]

        ends = [0, batch - 1]
        wide = {k: v[ends].double() for k, v in options.items()}
        leaf64 = x[ends].double().requires_grad_(True)
        y64 = group_norm_silu_ref(leaf64, weight.double(), bias.double(), GROUPS, EPS, **wide)
        (ref,) = torch.autograd.grad(y64, leaf64, dy[ends].double())
        error = checked(run()[ends], ref, 8 * torch.finfo(x.dtype).eps)
        return timed(run, settings, nbytes=moved, rel_err=error)

    return measure
