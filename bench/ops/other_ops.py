"""Measurements of the ops without their own file here, at the real shapes of their `cases.py`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench.measure import DTYPES, Case, Settings, check_error, compile_function, measure_call
from bench.ops.providers import measure_copy, our_implementations
from bench.results import Row
from bench.shapes import BATCHES

if TYPE_CHECKING:
    from admfast.ops.cases import OpCases

PRECISIONS = {"cuda": ("fp16", "bf16"), "cpu": ("bf16", "fp32")}
# Ops that other files here measure; `normal`, the noise, is part of `sampler_step`.
MEASURED_ELSEWHERE = frozenset({"attention", "conv", "group_norm_silu", "normal", "sampler_step"})


def kernels(settings: Settings) -> Iterator[Case]:
    """Yield cases for all implementations, the reference (eager, compiled), and a copy of as many bytes."""
    from admfast.ops import TABLES
    from admfast.ops.cases import all_cases

    for cases in all_cases():
        if cases.op in MEASURED_ELSEWHERE or cases.op not in TABLES:
            continue
        providers = ["copy", "eager", *our_implementations(cases.op, settings.device)]
        if settings.cuda:  # a compilation takes seconds
            providers.insert(2, "torch.compile")
        yield from _cases(cases, providers, settings)


def _cases(cases: OpCases, providers: list[str], settings: Settings) -> Iterator[Case]:
    kinds = {cases.op: False} | ({f"{cases.op}_grad": True} if cases.differentiable else {})
    names = list(cases.real)[: 1 if settings.quick else None]
    for batch, dtype in itertools.product(settings.some(BATCHES), settings.some(PRECISIONS)):
        for name, kind, provider in itertools.product(names, kinds, providers):
            measure = partial(_measured, cases, name, batch, dtype, provider, kinds[kind])
            yield Case(kind, dtype, provider, {"batch": batch, "call": name}, measure)


def _function(cases: OpCases, provider: str) -> Callable[..., Any]:
    """Return the function called `provider`."""
    impl = "reference" if provider in ("eager", "torch.compile") else provider
    call = partial(cases.call, impl=impl)
    return compile_function(call) if provider == "torch.compile" else call


def _nbytes(*values: Any) -> int:
    return sum(t.nbytes for t in values if isinstance(t, Tensor))


def _measured(
    cases: OpCases, name: str, batch: int, dtype: str, provider: str, gradient: bool, settings: Settings
) -> Row:
    generator = torch.Generator(settings.device).manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=settings.device)

    arguments = cases.arguments(draw, DTYPES[dtype], n=batch, **cases.real[name])
    leaves = {n: arguments[n] for n in cases.differentiable if n in arguments} if gradient else {}
    for leaf in leaves.values():
        leaf.requires_grad_(True)

    def outputs(function: Callable[..., Any], arguments_of_call: dict[str, Any]) -> tuple[Tensor, ...]:
        out = function(**arguments_of_call)
        return out if isinstance(out, tuple) else (out,)

    run = _function(cases, "eager" if provider == "copy" else provider)
    results = outputs(run, arguments)
    # Inputs and outputs count once; for a gradient, so do the gradients of both.
    moved = (2 if gradient else 1) * _nbytes(*arguments.values(), *results)
    if provider == "copy":
        return measure_copy(moved, settings)
    wide = {n: t.detach().double() if _floating(t) else t for n, t in arguments.items()}
    wide |= {n: wide[n].requires_grad_(True) for n in leaves}
    truth = outputs(_function(cases, "eager"), wide)
    limit = 8 * torch.finfo(DTYPES[dtype]).eps
    if not gradient:
        return measure_call(
            lambda: outputs(run, arguments),
            settings,
            check=lambda got: max(check_error(a, b, limit) for a, b in zip(got, truth, strict=True)),
            nbytes=moved,
        )
    dys = [torch.randn_like(y) for y in results]
    expected = torch.autograd.grad(truth, list(wide[n] for n in leaves), [dy.double() for dy in dys])
    return measure_call(
        lambda: torch.autograd.grad(results, list(leaves.values()), dys, retain_graph=True),
        settings,
        check=lambda got: max(check_error(a, b, 4 * limit) for a, b in zip(got, expected, strict=True)),
        nbytes=moved,
        gradient=True,
    )


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
