"""One batch of images on its way through the rows of a solver."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from admfast.engine.diagnose import first_nonfinite
from admfast.engine.engine import Engine
from admfast.engine.guidance import GuidanceFn, classifier_guidance
from admfast.engine.loop import Callback, Diverged, Model, apply_denoised_fn, run_rows, run_table
from admfast.engine.request import Plan, Request
from admfast.engine.step import Batch, StepKey
from admfast.errors import NonFiniteError
from admfast.ops.noise import normal
from admfast.solvers import SolverTable

LOG = logging.getLogger("admfast")


def sample_batch(
    engine: Engine, plan: Plan, request: Request, callback: Callback | None = None, every: int = 1
) -> Tensor:
    """Run a batch through the rows of the plan: float32 images [N, C, *spatial].

    By the engine's prepared step; where the plan has Python functions of a user's, row by row with those.

    Raises:
        NonFiniteError: naming the first layer that produced NaN or infinity.
    """
    engine.ready()
    x = _first_x(plan, request)
    python = [name for name in ("guidance_fn", "denoised_fn") if getattr(plan, name) is not None]
    try:
        if engine.options.prepared and not python:
            return _by_prepared_step(engine, plan, request, x, callback, every)
        if python:
            LOG.info("rows run one by one, not by a prepared step: %s is a Python function", python[0])
        model, options = _functions(engine, plan, request)
        return run_table(plan.table, model, x, callback=callback, every=every, **options).x
    except Diverged as error:
        raise _diagnosed(error, engine, plan, request, x) from None


def _by_prepared_step(
    engine: Engine, plan: Plan, request: Request, x: Tensor, callback: Callback | None, every: int
) -> Tensor:
    """Fill the engine's step for this batch and run it."""
    noise = None if request.step_noise is None else request.step_noise[plan.skipped :]
    batch = Batch(
        x, request.seeds, request.labels, request.low_res, noise, scale=plan.scale, noise_row=plan.skipped
    )
    conditional = engine.net.config.num_classes is not None  # type: ignore[union-attr]
    guided = plan.guided_rows()
    key = StepKey.of(plan.table, batch, guided, conditional, plan.streams[1])
    with engine.using(key, plan.impl) as step:
        try:
            step.fill(plan.table, batch)
            state = run_rows(plan.table, step, guided=guided, callback=callback, every=every)
            return state.x.clone()  # the buffer is the next batch's
        finally:
            step.leave()


def _functions(engine: Engine, plan: Plan, request: Request) -> tuple[Model, dict[str, Any]]:
    """The model and the options of `run_table`."""
    guidance = None if plan.guidance_fn is None else _on_a_copy(plan.guidance_fn)
    if plan.scale:
        assert engine.classifier is not None and request.labels is not None
        guidance = classifier_guidance(engine.classifier, request.labels, plan.scale)
    options: dict[str, Any] = dict(
        guidance=guidance,
        guided=plan.guided_rows(),
        denoised_fn=plan.denoised_fn,
        seeds=request.seeds,
        step_noise=None if request.step_noise is None else request.step_noise[plan.skipped :],
        noise_row=plan.skipped,
        stream=plan.streams[1],
        impl=plan.impl,
    )
    return engine.unchanged(conditioned(engine.net, request.labels, request.low_res)), options


def _diagnosed(error: Diverged, engine: Engine, plan: Plan, request: Request, x: Tensor) -> NonFiniteError:
    """The error that says which layer it was."""
    model, options = _functions(engine, plan, request)
    found, before = error, error.x
    if before is None:
        found, before = _again(plan.table, model, x, options)
    networks = {"net": engine.net, "classifier": engine.classifier}
    calls = {"its output": model, "the guidance": options["guidance"]}
    if plan.denoised_fn is not None:
        fn, row = plan.denoised_fn, found.row
        calls["what denoised_fn returned"] = lambda x, t: apply_denoised_fn(fn, row, x, model(x, t))
    where = first_nonfinite(networks, calls, before, found.t)
    return NonFiniteError(f"{found}; {where}")


def _first_x(plan: Plan, request: Request) -> Tensor:
    """What the first row begins from: noise, or x_start noised to that row's step."""
    if request.x_start is not None and not plan.noised:
        return request.x_start.clone()
    z = request.noise
    if z is None:
        z = normal(request.seeds, request.shape[1:], 0, plan.streams[0], plan.impl)
    if request.x_start is None:
        return z * plan.table.scale
    step = torch.full((len(z),), plan.table.rows[0].index, dtype=torch.int64, device=z.device)
    return plan.process.q_sample(request.x_start, step, z)


def _on_a_copy(function: GuidanceFn) -> GuidanceFn:
    """A user's function on its own copy of x and t: it may work in place."""
    return lambda x, t: function(x.clone(), t.clone())


def _again(table: SolverTable, model: Model, x: Tensor, options: dict[str, Any]) -> tuple[Diverged, Tensor]:
    """Run a batch that diverged once more, looking at every row: the same seeds lead to the same row.

    Returns the error and what went into its row.
    """
    try:
        run_table(table, model, x, careful=True, **options)
    except Diverged as error:
        assert error.x is not None
        return error, error.x
    raise NonFiniteError("x was not finite at the end, but is when the batch is run again: check the device")


def conditioned(
    net: nn.Module, labels: Tensor | None, low_res: Tensor | None
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return model(x, t) of a network with its conditions; labels go to class-conditional networks only."""
    extra: dict[str, Tensor] = {}
    if labels is not None and net.config.num_classes is not None:  # type: ignore[union-attr]
        extra["y"] = labels
    if low_res is not None:
        extra["low_res"] = low_res
    return lambda x, t: net(x, t, **extra)
