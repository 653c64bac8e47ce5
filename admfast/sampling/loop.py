"""Take images through the rows of a solver, from the noise to the pixels."""

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
from admfast.engine.numerics import own_numerics
from admfast.engine.step import PreparedStep
from admfast.errors import NonFiniteError
from admfast.files.levels import to_uint8
from admfast.ops.dispatch import Choice, watch
from admfast.ops.update import Row, SamplerState, SolverTable, normal
from admfast.sampling.diagnose import first_nonfinite
from admfast.sampling.functions import FunctionStep, apply_denoised_fn, function_step

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
    """Run rows: `advance(i)` runs row i on `state`; rows come in order from 0."""

    state: SamplerState

    def advance(self, i: int) -> None: ...


class Notes:
    """Keep the loop's notes of one or several runs, for `Pipeline.last_run`.

    images, seconds, pixels: images that came out, seconds of the runs, and those of them in which uint8 was
    made and brought to the CPU. stages: what `admfast.sampling.last_run` makes its reports of.
    """

    def __init__(self) -> None:
        self.images, self.seconds, self.pixels = 0, 0.0, 0.0
        self.stages: dict[str, dict[str, Any]] = {}

    def add(
        self, plan: Plan, step: PreparedStep | FunctionStep, begun: list[Choice], seconds: dict[str, float]
    ) -> None:
        """Note a batch that `step` ran in these seconds; begun: the choices before its first row."""
        none = {"images": 0, "batches": 0, "batch": 0, "seconds": dict.fromkeys(seconds, 0.0)}
        noted, size = self.stages.setdefault(plan.stage, none), plan.shape[0]
        for name, spent in seconds.items():
            if name != "first_row" or not noted["batches"]:
                noted["seconds"][name] += spent
        noted["images"] += size
        noted["batches"] += 1
        if size <= noted["batch"]:
            return
        noted["batch"], noted["choices"] = size, [*begun, *step.chosen()]
        prepared = step if isinstance(step, PreparedStep) else None
        noted["ran"] = {
            "sides": plan.shape[2:],
            "rows": len(plan.table),
            "guided_rows": sum(plan.guided),
            "unprepared": _unprepared(plan),
            **plan.engine.describe(prepared, plan.shape, any(plan.guided)),
        }


def run(plan: Plan, notes: Notes | None = None) -> Tensor:
    """Sample the images of a plan, batch by batch; a batch that does not fit into memory is halved.

    notes: where the run is noted; None: in notes of its own.
    Returns uint8 [N, *spatial, C] on the CPU or float32 [N, C, *spatial] on the device.
    Raises: NonFiniteError naming the first layer that produced NaN or infinity.
    """
    notes, began = Notes() if notes is None else notes, time.perf_counter()
    images, first, size = [], 0, plan.batch_size
    with own_numerics(plan.engine.device, plan.engine.policy.tf32):
        while first < plan.shape[0]:
            part = plan.part(first, size)
            try:
                images.append(_pixels(part, notes))
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
    whole = torch.cat(images)
    notes.images, notes.seconds = notes.images + len(whole), notes.seconds + time.perf_counter() - began
    plan.engine.last_run = notes
    return whole


def _pixels(plan: Plan, notes: Notes) -> Tensor:
    """Sample one batch by the base model and by what enlarges its images."""
    x = sample_batch(plan, notes)
    if plan.enlarging is not None:
        x = sample_batch(plan.enlarging.of(x), notes)
    if plan.output != "uint8":
        return x
    began = time.perf_counter()
    pixels = to_uint8(x).cpu()
    notes.pixels += time.perf_counter() - began
    return pixels


def sample_batch(plan: Plan, notes: Notes) -> Tensor:
    """Run one batch through its rows, and note how: float32 [N, C, *spatial].

    The engine's prepared step runs them; with Python functions of a user's they run by calls of the networks.
    """
    began = time.perf_counter()
    plan.engine.ready()
    folded = time.perf_counter()
    with watch() as begun:
        x = first_x(plan)
    try:
        with _runner(plan, x) as step:
            seconds = {"folding": folded - began, "preparing": time.perf_counter() - folded}
            found = run_rows(plan.table, step, plan, seconds=seconds).x
            notes.add(plan, step, begun, seconds)
            return found.clone()  # a prepared step's buffer is the next batch's
    except Diverged as error:
        raise _diagnosed(error, plan, x) from None


@contextlib.contextmanager
def _runner(plan: Plan, x: Tensor) -> Iterator[PreparedStep | FunctionStep]:
    """Give what runs the rows of a plan from x, ready for the first: the engine's step, or functions."""
    if _unprepared(plan) is not None:
        yield function_step(plan, x)
        return
    with plan.engine.using(plan) as step:
        step.fill(plan, x)
        yield step


def _unprepared(plan: Plan) -> str | None:
    """Say why no prepared step can run the rows of a plan; None where one can."""
    if plan.functions:
        return f"{', '.join(plan.functions)}: Python functions"
    return None if plan.engine.options.prepared else "EngineOptions(prepared=False)"


def first_x(plan: Plan) -> Tensor:
    """Return what the first row begins from: noise, or x_start noised to that row's step."""
    z = plan.noise
    if z is None:
        z = normal(plan.seeds, plan.shape[1:], 0, plan.first_stream, plan.impl)
    if plan.x_start is None:
        return z * plan.table.scale
    step = torch.full((len(z),), plan.table.rows[0].index, dtype=torch.int64, device=z.device)
    return plan.process.q_sample(plan.x_start, step, z)


def run_rows(
    table: SolverTable,
    step: Step,
    plan: Plan | None = None,
    careful: bool = False,
    seconds: dict[str, float] | None = None,
) -> SamplerState:
    """Run all rows of a table by a step; nothing but a callback's own work leaves the device.

    Args:
        table, step: the rows, and what runs them, ready for the first.
        plan: of the batch; its callback is called after every `every`-th row and after the last.
        careful: look at x after every row and keep what went into it, for the error. Always so on the CPU,
            where it costs next to nothing; else x is looked at after the first and the last row.
        seconds: gets those of the first row, of all rows, and of the callbacks between them.

    Raises:
        Diverged: if x is not finite after a row that was looked at.
    """
    state, total = step.state, len(table)
    careful = careful or state.x.device.type == "cpu"
    first, called, began = 0.0, 0.0, time.perf_counter()
    with torch.no_grad():
        for i, row in enumerate(table.rows):
            before = state.x.clone() if careful else None
            step.advance(i)
            last = i == total - 1
            if (careful or i == 0 or last) and not bool(torch.isfinite(state.x).all()):
                raise Diverged(row, before, table.seen(state.x)[0][i])
            if i == 0:
                first = time.perf_counter() - began
            if plan is not None and plan.callback is not None and ((i + 1) % plan.every == 0 or last):
                at = (i + 1, total, row.index, row.t_net)
                calling = time.perf_counter()
                plan.callback(Progress(*at, state.x, state.x0, plan.first, plan.stage))
                called += time.perf_counter() - calling
    if seconds is not None:
        seconds |= {"rows": time.perf_counter() - began - called, "first_row": first, "callbacks": called}
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
