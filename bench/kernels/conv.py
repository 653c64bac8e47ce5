"""`FoldedConv`, forward and input gradient: every implementation, F.conv2d in both layouts and compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from admfast.ops import TABLES, FoldedConv, conv_ref
from admfast.ops.conv_winograd import amplification
from bench.case import DTYPES, Case, Measure, Settings, checked, float32_mode, product_limit, timed
from bench.ceilings.conv import CPU_FLOP_LIMIT, searching
from bench.registry import BATCHES, ConvShape, distinct_convs
from bench.results import Row

PRECISIONS = {"cuda": ("fp16", "bf16", "tf32", "fp32"), "cpu": ("fp32", "bf16")}
COMPILED_ON_CPU = 6  # shapes: a compilation takes seconds there
PATCH = 8  # outputs along the sides of two opposite corners that are compared

Run = Callable[[torch.Tensor], torch.Tensor]


def cases(settings: Settings) -> Iterator[Case]:
    """Every shape and provider, values and the gradient in x; the likeliest precision and batch first."""
    shapes = distinct_convs()
    batches: tuple[int, ...] = BATCHES[settings.device.type]
    precisions: tuple[str, ...] = PRECISIONS[settings.device.type]
    if settings.quick:
        shapes, batches, precisions = (
            [pair for pair in shapes if pair[0].side == 16],
            batches[:1],
            precisions[:1],
        )
    for dtype in precisions:
        for batch in batches:
            for index, (shape, models) in enumerate(shapes):
                if not settings.cuda and shape.flop * batch > CPU_FLOP_LIMIT:
                    continue
                compiled = settings.cuda or (index < COMPILED_ON_CPU and batch == batches[0])
                sizes = {"batch": batch, "kernel": shape.kernel, "cin": shape.cin, "cout": shape.cout}
                sizes |= {"side": shape.side}
                for provider in _providers(shape, batch, dtype, settings, compiled):
                    for kind, gradient in (("conv", False), ("conv_grad", True)):
                        measure = _conv(shape, batch, dtype, provider, gradient)
                        yield Case(kind, dtype, provider, sizes, measure, {"models": models})


def _providers(shape: ConvShape, batch: int, dtype: str, settings: Settings, compiled: bool) -> list[str]:
    """Those of torch, and our implementations that serve the shape on this machine."""
    weight = torch.empty(shape.cout, shape.cin, shape.kernel, shape.kernel, device="meta")
    conv = FoldedConv(weight, padding=shape.kernel // 2, dtype=DTYPES[dtype])
    # Support is asked of a tensor that is where the real one will be, but holds nothing.
    x = torch.empty(batch, shape.cin, 0, 0, device=settings.device, dtype=DTYPES[dtype])
    ours = [
        entry.name
        for entry in TABLES["conv"].implementations
        if entry.name != "reference" and not (entry.available() or entry.supports(conv.directions[0], x))
    ]
    return ["eager", "eager channels-first", *(["torch.compile"] if compiled else []), *ours]


def provider_of(
    name: str, weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype
) -> tuple[Run, torch.memory_format]:
    """The function called `name` and the layout it is given."""
    padding = weight.shape[-1] // 2
    if name not in ("eager", "eager channels-first", "torch.compile"):
        conv = FoldedConv(weight, bias, padding=padding, dtype=dtype, impl=name)
        return conv, torch.channels_last
    layout = torch.contiguous_format if name == "eager channels-first" else torch.channels_last
    held, offset = weight.to(dtype).contiguous(memory_format=layout), bias.to(dtype)

    def eager(x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, held, offset, padding=padding)

    if name != "torch.compile":
        return eager, layout
    torch._dynamo.reset()  # Dynamo counts recompilations per function and gives up at the ninth shape
    return torch.compile(eager, fullgraph=True, dynamic=False), layout


def _conv(shape: ConvShape, batch: int, dtype: str, provider: str, gradient: bool) -> Measure:
    def measure(settings: Settings) -> Row:
        kernel, cin, cout, side = shape.size
        generator = torch.Generator(settings.device).manual_seed(0)

        def randn(*sizes: int) -> torch.Tensor:
            return torch.randn(sizes, generator=generator, device=settings.device)

        weight = (randn(cout, cin, kernel, kernel) / (cin * kernel**2) ** 0.5).to(DTYPES[dtype])
        bias = randn(cout).to(DTYPES[dtype])
        run, layout = provider_of(provider, weight, bias, DTYPES[dtype])
        x = randn(batch, cin, side, side).to(DTYPES[dtype]).contiguous(memory_format=layout)
        growth = amplification()[1] if provider == "winograd" else 1.0
        limit = growth * product_limit(dtype, cin * kernel**2)
        flop = batch * shape.flop
        with float32_mode(dtype), searching():
            if not gradient:
                with torch.inference_mode():
                    error = _check(run(x), x, weight, bias, limit)
                    return timed(lambda: run(x), settings, flop=flop, rel_err=error)
            leaf = x.requires_grad_(True)
            y = run(leaf)
            dy = randn(*y.shape).to(DTYPES[dtype]).contiguous(memory_format=layout)
            (dx,) = torch.autograd.grad(y, leaf, dy, retain_graph=True)
            turned = weight.flip(2, 3).transpose(0, 1)
            error = _check(dx, dy, turned, None, growth * product_limit(dtype, cout * kernel**2))
            return timed(
                lambda: torch.autograd.grad(y, leaf, dy, retain_graph=True),
                settings,
                flop=flop,
                rel_err=error,
            )

    return measure


def _check(
    out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, limit: float
) -> float:
    """Compare two corners of the first and the last image with the sum in float64."""
    ends, border = [0, len(x) - 1], weight.shape[-1] // 2
    wide = [None if t is None else t.detach().double().cpu() for t in (weight, bias)]
    errors = []
    for corner in (slice(None, PATCH + border), slice(-PATCH - border, None)):
        patch = x.detach()[ends][:, :, corner, corner].double().cpu()
        inside = slice(None, PATCH) if corner.start is None else slice(-PATCH, None)
        ref = conv_ref(patch, *wide, padding=border)[:, :, inside, inside]
        errors.append(checked(out[ends][:, :, inside, inside], ref, limit))
    return max(errors)
