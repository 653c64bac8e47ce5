"""Take images through the rows of a solver, from the noise to the pixels."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from admfast.engine.engine import out_of_memory
from admfast.engine.numerics import own_numerics
from admfast.errors import NonFiniteError
from admfast.files.levels import to_uint8
from admfast.ops.update import Row, SamplerState, SolverTable, normal
from admfast.sampling.diagnose import first_nonfinite
from admfast.sampling.functions import apply_denoised_fn, function_step

if TYPE_CHECKING:
    from admfast.sampling.plan import Plan

LOG = logging.getLogger("admfast")


@dataclass(frozen=True)
class Progress:
    """The argument of a callback, made after a row: tensors are live buffers, to be copied if kept.

    done, total: rows run and rows in all. index: the step's index in the schedule. t: what the network saw.
    x: [N, C, H, W] after the row. x0: the reported x_0. first: number of the batch's first image among all.
    stage: "base", or "upsampler" in the second half of a cascade.
    """

    done: int
    total: int
    index: int
    t: float
    x: Tensor
    x0: Tensor
    first: int = 0
    stage: str = "base"


Callback = Callable[[Progress], None]


class Diverged(NonFiniteError):
    """x is not finite after a `row`; `x` and `t` are what went into it, where they are known."""

    def __init__(self, row: Row, x: Tensor | None, t: Tensor):
        super().__init__(f"x is not finite after step {row.index} (t = {row.t_net:g})")
        self.row, self.x, self.t = row, x, t


class Step(Protocol):
    """Something that runs rows: `advance(i)` runs row i on `state`, rows coming in order from 0."""

    state: SamplerState

    def advance(self, i: int) -> None: ...


def run(plan: Plan) -> Tensor:
    """Sample the images of a plan, batch by batch; a batch that does not fit into memory is halved.

    Returns uint8 [N, *spatial, C] on the CPU or float32 [N, C, *spatial] on the device.
    Raises: NonFiniteError naming the first layer that produced NaN or infinity.
    """
    images, first, size = [], 0, plan.batch_size
    with own_numerics(plan.engine.device, plan.engine.policy.tf32):
        while first < plan.shape[0]:
            part = plan.part(first, size)
            try:
                images.append(_pixels(part))
            except RuntimeError as error:
                if not out_of_memory(error) or part.shape[0] == 1:
                    raise
                size = -(-part.shape[0] // 2)
                LOG.warning("out of memory with %d images at a time: going on with %d", part.shape[0], size)
            else:
                first += size
                continue
            # Here, as the exception holds on to the memory of what raised it.
            for stage in (plan, plan.enlarging):
                if stage is not None:
                    stage.engine.release()
    return torch.cat(images)


def _pixels(plan: Plan) -> Tensor:
    """Sample one batch by the base model and by what enlarges its images."""
    x = sample_batch(plan)
    if plan.enlarging is not None:
        x = sample_batch(plan.enlarging.of(x))
    return to_uint8(x).cpu() if plan.output == "uint8" else x


def sample_batch(plan: Plan) -> Tensor:
    """Run one batch through its rows: float32 [N, C, *spatial].

    The engine's prepared step runs them; with Python functions of a user's they run by calls of the networks.
    """
    plan.engine.ready()
    x = first_x(plan)
    try:
        if plan.guides or plan.denoised_fn is not None or not plan.engine.options.prepared:
            return run_rows(plan.table, function_step(plan, x), plan).x
        with plan.engine.using(plan) as step:
            step.fill(plan, x)
            return run_rows(plan.table, step, plan).x.clone()  # the buffer is the next batch's
    except Diverged as error:
        raise _diagnosed(error, plan, x) from None


def first_x(plan: Plan) -> Tensor:
    """Return what the first row begins from: noise, or x_start noised to that row's step."""
    z = plan.noise
    if z is None:
        z = normal(plan.seeds, plan.shape[1:], 0, plan.first_stream, plan.impl)
    if plan.x_start is None:
        return z * plan.table.scale
    step = torch.full((len(z),), plan.table.rows[0].index, dtype=torch.int64, device=z.device)
    return plan.process.q_sample(plan.x_start, step, z)


def run_rows(table: SolverTable, step: Step, plan: Plan | None = None, careful: bool = False) -> SamplerState:
    """Run all rows of a table by a step; nothing but a callback's own work leaves the device.

    Args:
        table, step: the rows, and what runs them, ready for the first.
        plan: of the batch; its callback is called after every `every`-th row and after the last.
        careful: look at x after every row and keep what went into it, for the error. Always so on the CPU,
            where it costs next to nothing; else x is looked at after the first and the last row.

    Raises:
        Diverged: if x is not finite after a row that was looked at.
    """
    state, total = step.state, len(table)
    careful = careful or state.x.device.type == "cpu"
    with torch.no_grad():
        for i, row in enumerate(table.rows):
            before = state.x.clone() if careful else None
            step.advance(i)
            last = i == total - 1
            if (careful or i == 0 or last) and not bool(torch.isfinite(state.x).all()):
                raise Diverged(row, before, table.seen(state.x)[0][i])
            if plan is not None and plan.callback is not None and ((i + 1) % plan.every == 0 or last):
                at = (i + 1, total, row.index, row.t_net)
                plan.callback(Progress(*at, state.x, state.x0, plan.first, plan.stage))
    return state


def _diagnosed(error: Diverged, plan: Plan, x: Tensor) -> NonFiniteError:
    """Return the error that names the layer which made a batch from `x` diverge."""
    found, before = error, error.x
    if before is None:
        found, before = _again(plan, x)
    step = function_step(plan, x)
    networks = {"net": plan.engine.net, "classifier": plan.engine.classifier}
    index = plan.table.rows.index(found.row)
    calls: dict[str, Callable[[Tensor, Tensor], Tensor] | None] = {"its output": step.model}
    if any(rows[index] for _, rows in step.guides):
        calls["the guidance"] = lambda x, t: step.evaluated(x, index)[1]  # type: ignore[assignment, return-value]
    if plan.denoised_fn is not None:
        fn, row = plan.denoised_fn, found.row
        calls["what denoised_fn returned"] = lambda x, t: apply_denoised_fn(fn, row, x, step.model(x, t))
    return NonFiniteError(f"{found}; {first_nonfinite(networks, calls, before, found.t)}")


def _again(plan: Plan, x: Tensor) -> tuple[Diverged, Tensor]:
    """Run a batch that diverged once more, looking at every row: the same seeds lead to the same row.

    Returns the error and what went into its row.
    """
    try:
        run_rows(plan.table, function_step(plan, x), careful=True)
    except Diverged as error:
        assert error.x is not None
        return error, error.x
    raise NonFiniteError("x was not finite at the end, but is when the batch is run again: check the device")
