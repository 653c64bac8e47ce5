"""The loop that runs a solver's table: network, guidance, one update per row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from admfast import checks
from admfast.engine.guidance import GuidanceFn
from admfast.errors import NonFiniteError, invalid
from admfast.ops.noise import Stream
from admfast.ops.sampler_step import Clip, Row, SamplerState, pack, sampler_step
from admfast.solvers import SolverTable

Model = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Progress:
    """What a callback sees after a row: tensors are live buffers, to be copied if kept.

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


def numbered(callback: Callback | None, first: int, stage: str) -> Callback | None:
    """The callback, told which image its batch begins with and which model runs."""
    if callback is None:
        return None
    return lambda progress: callback(dataclasses.replace(progress, first=first, stage=stage))


class Diverged(NonFiniteError):
    """x is not finite after a `row`; `x` and `t` are what went into it, where they are known."""

    def __init__(self, row: Row, x: Tensor | None, t: Tensor):
        super().__init__(f"x is not finite after step {row.index} (t = {row.t_net:g})")
        self.row, self.x, self.t = row, x, t


class Step(Protocol):
    """What runs rows: `advance(i, guided)` runs row i on `state`, rows coming in order from 0."""

    state: SamplerState

    def advance(self, i: int, guided: bool) -> None: ...


def run_rows(
    table: SolverTable,
    step: Step,
    *,
    guided: Sequence[bool],
    callback: Callback | None = None,
    every: int = 1,
    careful: bool = False,
) -> SamplerState:
    """Run all rows of a table by a step; nothing but a callback's own work leaves the device.

    Args:
        table, step: the rows, and what runs them, ready for the first.
        guided: for every row whether it is guided.
        callback: called after every `every`-th row and after the last.
        careful: look at x after every row and keep what went into it, for the error. Always so on the CPU,
            where it costs next to nothing; else x is looked at after the first and the last row.

    Raises:
        Diverged: if x is not finite after a row that was looked at.
    """
    if every < 1:
        raise invalid("every", every, "1 or more")
    state, total = step.state, len(table)
    careful = careful or state.x.device.type == "cpu"
    with torch.no_grad():
        for i, row in enumerate(table.rows):
            before = state.x.clone() if careful else None
            step.advance(i, guided[i])
            last = i == total - 1
            if (careful or i == 0 or last) and not bool(torch.isfinite(state.x).all()):
                raise Diverged(row, before, _timesteps(table, state.x)[0][i])
            if callback is not None and ((i + 1) % every == 0 or last):
                callback(Progress(i + 1, total, row.index, row.t_net, state.x, state.x0))
    return state


class FunctionStep:
    """A row by functions of (x, t), a user's own among them."""

    def __init__(
        self,
        table: SolverTable,
        model: Model,
        x: Tensor,
        *,
        guidance: GuidanceFn | None = None,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        seeds: Tensor | None = None,
        step_noise: Tensor | None = None,
        noise_row: int = 0,
        stream: int = Stream.STEPS,
        impl: str | None = None,
    ):
        if step_noise is not None and step_noise.shape != (len(table), *x.shape):
            raise invalid("step_noise.shape", tuple(step_noise.shape), f"{(len(table), *tuple(x.shape))}")
        rows = table.rows if denoised_fn is None else tuple(_given_x0(row) for row in table.rows)
        self.rows, self.model, self.guidance, self.denoised_fn = table.rows, model, guidance, denoised_fn
        self.state = SamplerState.start(x, rows)
        self.packed = pack(rows, device=x.device, dtype=x.dtype)
        self.t_net, self.t_clf = _timesteps(table, x)
        self.step_noise, self.noise_row = step_noise, noise_row
        self.options = dict(seeds=seeds, stream=stream, impl=impl)

    def advance(self, i: int, guided: bool) -> None:
        x, gradient = self.state.x, None
        out = self.model(x, self.t_net[i])
        if self.guidance is not None and guided:
            # Detached: a function that makes its x a leaf must not make the state one.
            gradient = self.guidance(x.detach(), self.t_clf[i])
            checks.images("guidance(x, t)", gradient, tuple(x.shape))
        if self.denoised_fn is not None:
            out = apply_denoised_fn(self.denoised_fn, self.rows[i], x, out)
        noise = None if self.step_noise is None else self.step_noise[i]
        row = self.noise_row + i
        sampler_step(
            self.state,
            out,
            self.packed,
            i,
            grad=gradient,
            noise=noise,
            noise_row=row,
            **self.options,  # type: ignore[arg-type]
        )


def run_table(
    table: SolverTable,
    model: Model,
    x: Tensor,
    *,
    callback: Callback | None = None,
    every: int = 1,
    careful: bool = False,
    guided: Sequence[bool] | None = None,
    **options: Any,
) -> SamplerState:
    """Run all rows by functions, from x, and return the final state.

    Args:
        table: the solver's rows.
        model: model(x, t) -> the network's output [N, C or 2C, *spatial]; t is [N], int64 or float32.
        x: [N, C, *spatial], already scaled, float32 (float64 runs the reference).
        callback, every, careful, guided: see `run_rows`; all rows are guided where nothing is said.
        options: of `FunctionStep`: guidance(x, t) -> gradient like x, called without gradients being
            recorded; denoised_fn, which maps x_0 before it is limited (then the row's x_0 is made in
            PyTorch); seeds [N] int64 for the noise of every row, or step_noise [rows, N, C, *spatial];
            noise_row, the counter of the first row's noise; stream of the noise; impl of the update.

    Raises:
        Diverged: if x is not finite after a row that was looked at.
    """
    step = FunctionStep(table, model, x, **options)
    flags = [True] * len(table) if guided is None else guided
    return run_rows(table, step, guided=flags, callback=callback, every=every, careful=careful)


def _timesteps(table: SolverTable, x: Tensor) -> tuple[Tensor, Tensor]:
    """What network and guidance see of t: [rows, N] each."""
    dtype = torch.int64 if table.integer_t else torch.float32
    columns = torch.tensor([(row.t_net, row.t_clf) for row in table.rows], dtype=torch.float64)
    seen = columns.to(dtype).to(x.device).T[:, :, None].expand(2, len(table), len(x))
    return seen[0], seen[1]


def _given_x0(row: Row) -> Row:
    """The row for an `out` whose mean part is x_0 itself."""
    if row.clip == Clip.REPORTED:
        allowed = "not for a network that predicts the previous x: its update ignores x_0"
        raise invalid("denoised_fn", "given", allowed)
    return dataclasses.replace(row, k_x=0.0, k_out=1.0)


def apply_denoised_fn(denoised_fn: Callable[[Tensor], Tensor], row: Row, x: Tensor, out: Tensor) -> Tensor:
    """Replace the mean part of `out` by denoised_fn(x_0)."""
    channels = x.shape[1]
    out = out.to(x.dtype)
    x0 = denoised_fn(row.k_x * x + row.k_out * out[:, :channels])
    checks.images("denoised_fn(x_0)", x0, tuple(x.shape))
    return torch.cat([x0, out[:, channels:]], dim=1)
