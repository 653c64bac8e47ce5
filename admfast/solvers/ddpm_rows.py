"""Ancestral sampling (DDPM, Ho et al. 2020)."""

from __future__ import annotations

from admfast.diffusion import GaussianDiffusion
from admfast.ops.update import Row, SolverTable
from admfast.solvers.solver import Solver, choose_clip, register, row_inputs


@register
def ddpm() -> Solver:
    """Return ancestral sampling (DDPM)."""
    return Solver("ddpm", _table)


def _table(process: GaussianDiffusion, *, clip: bool) -> SolverTable:
    """Return the table of x_{t-1} = mean(x_t, x_0) + sigma^2 g + sigma z, for t = S-1..0.

    mean is that of q(x_{t-1} | x_t, x_0); sigma is learned or fixed; at t = 0 guidance is added, noise isn't.
    Guidance: "Diffusion Models Beat GANs", algorithm 1 (it changes the mean, not x_0).
    Source: Ho et al. 2020, algorithm 2; `p_sample` of the published code.

    process: already respaced. clip: clip x_0 to [-1, 1].
    """
    schedule = process.schedule
    rows = []
    for i in reversed(range(schedule.num_timesteps)):
        l0, l1 = process.log_variance_coefficients(i)
        rows.append(
            Row(
                **row_inputs(process, i),
                l0=l0,
                l1=l1,
                a=float(schedule.posterior_mean_coef2[i]),
                b=float(schedule.posterior_mean_coef1[i]),
                k_mean=1.0,
                k_z=1.0 if i else 0.0,
                clip=choose_clip(process, clip, network_mean=True),
            )
        )
    return SolverTable("ddpm", tuple(rows), integer_t=schedule.integer_t)
