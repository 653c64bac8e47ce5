"""The loop that runs a solver's table: network, guidance, one update per row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from admfast.engine.arguments import float_images
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


class Diverged(NonFiniteError):
    """x is not finite after a `row`; `x` and `t` are what went into it, where they are known."""

    def __init__(self, row: Row, x: Tensor | None, t: Tensor):
        super().__init__(f"x is not finite after step {row.index} (t = {row.t_net:g})")
        self.row, self.x, self.t = row, x, t


def run_table(
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
    callback: Callback | None = None,
    every: int = 1,
    impl: str | None = None,
    careful: bool = False,
) -> SamplerState:
    """Run all rows from x and return the final state; nothing but a callback's own work leaves the device.

    Args:
        table: the solver's rows.
        model: model(x, t) -> the network's output [N, C or 2C, *spatial]; t is [N], int64 or float32.
        x: [N, C, *spatial], already scaled, float32 (float64 runs the reference).
        guidance: guidance(x, t) -> gradient like x, or None. It is called without gradients being recorded.
        denoised_fn: maps x_0 before it is limited (then the row's x_0 is made in PyTorch).
        seeds: [N] int64, for the noise of every row.
        step_noise: [rows, N, C, *spatial] used instead.
        noise_row: counter of the first row's noise.
        stream: stream of the noise.
        callback: called after every `every`-th row and after the last.
        impl: implementation of the update.
        careful: look at x after every row and keep what went into it, for the error. Always so on the CPU,
            where it costs next to nothing; else x is looked at after the first and the last row.

    Raises:
        Diverged: if x is not finite after a row that was looked at.
    """
    if every < 1:
        raise invalid("every", every, "1 or more")
    if step_noise is not None and step_noise.shape != (len(table), *x.shape):
        raise invalid("step_noise.shape", tuple(step_noise.shape), f"{(len(table), *tuple(x.shape))}")
    rows = table.rows if denoised_fn is None else tuple(_given_x0(row) for row in table.rows)
    state = SamplerState.start(x, rows)
    packed = pack(rows, device=x.device, dtype=x.dtype)
    t_net, t_clf = _timesteps(table, x)
    careful = careful or x.device.type == "cpu"
    with torch.no_grad():
        for i, row in enumerate(table.rows):
            before = state.x.clone() if careful else None
            out = model(state.x, t_net[i])
            gradient = None
            if guidance is not None:
                # Detached: a function that makes its x a leaf must not make the state one.
                gradient = guidance(state.x.detach(), t_clf[i])
                float_images("guidance(x, t)", gradient, tuple(x.shape))
            if denoised_fn is not None:
                out = apply_denoised_fn(denoised_fn, row, state.x, out)
            sampler_step(
                state,
                out,
                packed,
                i,
                grad=gradient,
                seeds=seeds,
                noise=None if step_noise is None else step_noise[i],
                noise_row=noise_row + i,
                stream=stream,
                impl=impl,
            )
            last = i == len(rows) - 1
            if (careful or i == 0 or last) and not bool(torch.isfinite(state.x).all()):
                raise Diverged(row, before, t_net[i])
            if callback is not None and ((i + 1) % every == 0 or last):
                callback(Progress(i + 1, len(rows), row.index, row.t_net, state.x, state.x0))
    return state


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
    float_images("denoised_fn(x_0)", x0, tuple(x.shape))
    return torch.cat([x0, out[:, channels:]], dim=1)
