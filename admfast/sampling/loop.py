"""The sampling loop: run images through the rows of a solver, from noise to pixels."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from admfast.engine.engine import out_of_memory
from admfast.engine.numerics import fixed_numerics
from admfast.engine.step import PreparedStep
from admfast.errors import NonFiniteError
from admfast.files.levels import to_uint8
from admfast.ops.dispatch import Choice, record_choices
from admfast.ops.update import Row, SamplerState, SolverTable, normal
from admfast.sampling.diagnose import first_nonfinite
from admfast.sampling.functions import FunctionStep, apply_denoised_fn, make_function_step

if TYPE_CHECKING:
    from admfast.sampling.plan import Plan

LOG = logging.getLogger("admfast")


@dataclass(frozen=True)
class Progress:
    """Argument of a callback, which is called after a row. Its tensors are live buffers: copy what you keep.

    done, total: rows run so far, and rows in total. index: the step's index in the respaced schedule. t: the
    timestep that the network saw. x: [N, C, H, W] after the row. x0: the row's prediction of x_0, like x.
    first: index of the batch's first image among all requested images. stage: "base", or "upsampler" in the
    second half of a cascade.
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
    """x is not finite after `row`. x: the input of that row, None if not kept. t: its timesteps, [N]."""

    def __init__(self, row: Row, x: Tensor | None, t: Tensor):
        super().__init__(f"x is not finite after step {row.index} (t = {row.t_net:g})")
        self.row, self.x, self.t = row, x, t


class Step(Protocol):
    """A step that runs rows: `advance(i)` runs row i on `state`; it is called with i = 0, 1, ... in order."""

    state: SamplerState

    def advance(self, i: int) -> None: ...


class RunRecord:
    """Record of one or several calls of `run`, for `Pipeline.last_run`.

    images, seconds: number of images sampled, and seconds of the calls. pixels: the part of those seconds
    spent on conversion to uint8 and the copy to the CPU. stages: for each stage the facts from which
    `admfast.sampling.last_run` makes its report.
    """

    def __init__(self) -> None:
        self.images, self.seconds, self.pixels = 0, 0.0, 0.0
        self.stages: dict[str, dict[str, Any]] = {}

    def add(
        self,
        plan: Plan,
        step: PreparedStep | FunctionStep,
        initial_choices: list[Choice],
        seconds: dict[str, float],
    ) -> None:
        """Add a batch that `step` ran.

        initial_choices: choices made before its first row. seconds: of each part.
        """
        empty = {"images": 0, "batches": 0, "batch": 0, "seconds": dict.fromkeys(seconds, 0.0)}
        stage_record, size = self.stages.setdefault(plan.stage, empty), plan.shape[0]
        for name, spent in seconds.items():
            if name != "first_row" or not stage_record["batches"]:
                stage_record["seconds"][name] += spent
        stage_record["images"] += size
        stage_record["batches"] += 1
        if size <= stage_record["batch"]:
            return
        stage_record["batch"] = size
        stage_record["choices"] = [*initial_choices, *step.implementation_choices()]
        prepared = step if isinstance(step, PreparedStep) else None
        stage_record["ran"] = {
            "sides": plan.shape[2:],
            "rows": len(plan.table),
            "guided_rows": sum(kind.gradient for kind in plan.kinds),
            "reused_rows": sum(kind.kept for kind in plan.kinds),
            "null_class_rows": sum(kind.null for kind in plan.kinds),
            "weak_network_rows": sum(kind.weak for kind in plan.kinds),
            "not_prepared_reason": _reason_not_prepared(plan),
            **plan.engine.describe(prepared, plan.shape, any(kind.is_guided for kind in plan.kinds)),
        }


def run(plan: Plan, record: RunRecord | None = None) -> Tensor:
    """Sample the images of a plan, batch by batch; a batch that does not fit into memory is halved.

    record: the record to which this call is added; None makes a new one.
    Returns uint8 [N, *spatial, C] on the CPU or float32 [N, C, *spatial] on the device.
    Raises: NonFiniteError naming the first layer that produced NaN or infinity.
    """
    record, start = RunRecord() if record is None else record, time.perf_counter()
    images, first, size = [], 0, plan.batch_size
    with fixed_numerics(plan.engine.device, plan.engine.policy.tf32):
        while first < plan.shape[0]:
            part = plan.part(first, size)
            try:
                images.append(_sample_pixels(part, record))
            except RuntimeError as error:
                if not out_of_memory(error) or part.shape[0] == 1:
                    raise
                size = -(-part.shape[0] // 2)
                LOG.warning("out of memory with %d images at a time: going on with %d", part.shape[0], size)
            else:
                first += size
                continue
            # Outside the except block: there, the exception keeps the memory of the failed call alive.
            for stage in (plan, plan.upsampler_plan):
                if stage is not None:
                    stage.engine.release()
    all_images = torch.cat(images)
    record.images, record.seconds = (
        record.images + len(all_images),
        record.seconds + time.perf_counter() - start,
    )
    plan.engine.last_run = record
    return all_images


def _sample_pixels(plan: Plan, record: RunRecord) -> Tensor:
    """Sample one batch with the base model and then the upsampler, if any; return it as `output` asks."""
    x = sample_batch(plan, record)
    if plan.upsampler_plan is not None:
        x = sample_batch(plan.upsampler_plan.with_low_res(x), record)
    if plan.output != "uint8":
        return x
    start = time.perf_counter()
    pixels = to_uint8(x).cpu()
    record.pixels += time.perf_counter() - start
    return pixels


def sample_batch(plan: Plan, record: RunRecord) -> Tensor:
    """Run one batch through its rows and record how it ran; return float32 [N, C, *spatial].

    The engine's prepared step runs the rows. A `FunctionStep` runs them if the plan holds Python functions of
    the user or a dynamic threshold, or if prepared steps are switched off.
    """
    start = time.perf_counter()
    plan.engine.ensure_folded()
    ready_time = time.perf_counter()
    with record_choices() as initial_choices:
        x = initial_x(plan)
    try:
        with _step_for(plan, x) as step:
            seconds = {"folding": ready_time - start, "preparing": time.perf_counter() - ready_time}
            images = run_rows(plan.table, step, plan, seconds=seconds).x
            record.add(plan, step, initial_choices, seconds)
            return images.clone()  # the next batch overwrites a prepared step's buffer
    except Diverged as error:
        raise _diagnose(error, plan, x) from None


@contextlib.contextmanager
def _step_for(plan: Plan, x: Tensor) -> Iterator[PreparedStep | FunctionStep]:
    """Yield the step that runs a plan's rows from x, ready for row 0: prepared, or a `FunctionStep`."""
    if _reason_not_prepared(plan) is not None:
        yield make_function_step(plan, x)
        return
    with plan.engine.borrow_step(plan) as step:
        step.fill(plan, x)
        yield step


def _reason_not_prepared(plan: Plan) -> str | None:
    """Return why no prepared step can run the rows of a plan; None if one can."""
    if plan.unprepared:
        return "; ".join(f"{name}: {reason}" for name, reason in plan.unprepared.items())
    return None if plan.engine.options.prepared else "EngineOptions(prepared=False)"


def initial_x(plan: Plan) -> Tensor:
    """Return the input of the first row: noise, or x_start noised to that row's step."""
    z = plan.noise
    if z is None:
        z = normal(plan.seeds, plan.shape[1:], 0, plan.first_stream, plan.impl)
    if plan.x_start is None:
        return z * plan.table.noise_scale
    step = torch.full((len(z),), plan.table.rows[0].index, dtype=torch.int64, device=z.device)
    return plan.process.q_sample(plan.x_start, step, z)


def run_rows(
    table: SolverTable,
    step: Step,
    plan: Plan | None = None,
    check_every_row: bool = False,
    seconds: dict[str, float] | None = None,
) -> SamplerState:
    """Run all rows of a solver's table with a step; the images stay on the device.

    Args:
        table, step: the rows, and the step that runs them, ready for row 0.
        plan: plan of the batch; its callback is called after every `every`-th row and after the last.
        check_every_row: check x after every row and keep the row's input for the error. Always on for the
            CPU, where it costs almost nothing; otherwise x is checked only after the first and the last row.
        seconds: gets the seconds of all rows, of the first row, and of the callbacks (not part of the rows).

    Raises:
        Diverged: if x is not finite after a checked row.
    """
    state, total = step.state, len(table)
    check_every_row = check_every_row or state.x.device.type == "cpu"
    first_row_seconds, callback_seconds, start = 0.0, 0.0, time.perf_counter()
    with torch.no_grad():
        for i, row in enumerate(table.rows):
            row_input = state.x.clone() if check_every_row else None
            step.advance(i)
            last = i == total - 1
            if (check_every_row or i == 0 or last) and not bool(torch.isfinite(state.x).all()):
                raise Diverged(row, row_input, table.timesteps_for(state.x)[0][i])
            if i == 0:
                first_row_seconds = time.perf_counter() - start
            if plan is not None and plan.callback is not None and ((i + 1) % plan.every == 0 or last):
                position = (i + 1, total, row.index, row.t_net)
                callback_start = time.perf_counter()
                plan.callback(Progress(*position, state.x, state.x0, plan.first, plan.stage))
                callback_seconds += time.perf_counter() - callback_start
    if seconds is not None:
        rows = time.perf_counter() - start - callback_seconds
        seconds |= {"rows": rows, "first_row": first_row_seconds, "callbacks": callback_seconds}
    return state


def _diagnose(error: Diverged, plan: Plan, x: Tensor) -> NonFiniteError:
    """Return the error that names the layer at which a batch that began at `x` diverged."""
    diverged, row_input = error, error.x
    if row_input is None:
        diverged, row_input = _rerun_checked(plan, x)
    step = make_function_step(plan, x)
    networks = {"net": plan.engine.net, "classifier": plan.engine.classifier, "weak": plan.engine.weak}
    index = plan.table.rows.index(diverged.row)
    calls: dict[str, Callable[[Tensor, Tensor], Tensor] | None] = {"its output": step.model}
    kind = plan.kinds[index]
    if kind.null or kind.weak:
        calls["its guided output"] = lambda x, t: step.evaluate(x, index)[0]
    if kind.gradient or kind.kept or any(rows[index] for _, rows in step.guides):
        calls["the guidance"] = lambda x, t: step.evaluate(x, index)[1]  # type: ignore[assignment, return-value]
    if plan.denoised_fn is not None:
        fn, row = plan.denoised_fn, diverged.row
        calls["what denoised_fn returned"] = lambda x, t: apply_denoised_fn(fn, row, x, step.model(x, t))
    return NonFiniteError(f"{diverged}; {first_nonfinite(networks, calls, row_input, diverged.t)}")


def _rerun_checked(plan: Plan, x: Tensor) -> tuple[Diverged, Tensor]:
    """Run a diverged batch again and check every row; the same seeds diverge at the same row.

    Returns the error and the input of its row.
    """
    try:
        run_rows(plan.table, make_function_step(plan, x), check_every_row=True)
    except Diverged as error:
        assert error.x is not None
        return error, error.x
    raise NonFiniteError("x was not finite, but is finite when the batch runs again: check the device")
