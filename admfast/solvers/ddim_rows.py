"""DDIM (Song et al. 2020) and its inverse."""

from __future__ import annotations

import math

from admfast.checks import finite_float
from admfast.diffusion import GaussianDiffusion
from admfast.ops.update import Row, SolverTable
from admfast.solvers.solver import Solver, choose_clip, register, row_inputs


@register
def ddim(*, eta: float = 0.0) -> Solver:
    """Return DDIM. eta: 0 is deterministic, 1 has the variance of DDPM; 0..1. Raises: InvalidArgument."""
    return Solver("ddim", _ddim_table, {"eta": finite_float("eta", eta, least=0, most=1)}, spacing="ddim")


@register
def ddim_inverse() -> Solver:
    """Return the inverse of the deterministic DDIM, which turns clean images into their noise."""
    return Solver("ddim-inverse", _inverse_table, starts_from="image", spacing="ddim")


def _ddim_table(process: GaussianDiffusion, *, eta: float, clip: bool) -> SolverTable:
    """Return the table of x_prev = sqrt(ab_prev) x_0 + sqrt(1 - ab_prev - sigma^2) eps + sigma z, t = S-1..0.

    ab is alpha_bar, eps is recomputed from the clipped x_0, and
    sigma = eta sqrt((1 - ab_prev) / (1 - ab)) sqrt(1 - ab / ab_prev). Guidance ("Diffusion Models Beat GANs",
    algorithm 2) adds (1 - ab) / sqrt(ab) g to the clipped x_0. Source: Song et al. 2020, eq. 12 and 16;
    `ddim_sample` of the published code.

    process: already respaced. clip: clip x_0 to [-1, 1].
    """
    schedule = process.schedule
    rows = []
    for i in reversed(range(schedule.num_timesteps)):
        alpha_bar, alpha_bar_prev = float(schedule.alphas_cumprod[i]), float(schedule.alphas_cumprod_prev[i])
        noise_ratio = (1 - alpha_bar_prev) / (1 - alpha_bar)
        sigma = eta * math.sqrt(noise_ratio) * math.sqrt(1 - alpha_bar / alpha_bar_prev)
        k_eps = math.sqrt(max(1 - alpha_bar_prev - sigma**2, 0.0))
        rows.append(_row(process, i, alpha_bar_prev, k_eps, sigma if i else 0.0, clip))
    return SolverTable("ddim", tuple(rows), integer_t=schedule.integer_t)


def _inverse_table(process: GaussianDiffusion, *, clip: bool) -> SolverTable:
    """Return the table that runs the deterministic DDIM backwards, from an image to its noise, t = 0..S-1.

    x_next = sqrt(ab_next) x_0 + sqrt(1 - ab_next) eps; in the last row ab_next is 0, so that x_next = eps.
    The first row's x is the image without noise: as published, it is treated as x at the first kept step. The
    published step has no guidance; if guidance is given, rows add it in the same way as in `ddim`.
    Source: `ddim_reverse_sample` of the published code.

    process: already respaced. clip: clip x_0 to [-1, 1].
    """
    schedule = process.schedule
    rows = []
    for i in range(schedule.num_timesteps):
        alpha_bar_next = float(schedule.alphas_cumprod_next[i])
        rows.append(_row(process, i, alpha_bar_next, math.sqrt(1 - alpha_bar_next), 0.0, clip))
    return SolverTable("ddim-inverse", tuple(rows), integer_t=schedule.integer_t)


def _row(
    process: GaussianDiffusion, i: int, alpha_bar_to: float, k_eps: float, sigma: float, clip: bool
) -> Row:
    """Return the row of x_next = sqrt(alpha_bar_to) x_0 + k_eps eps + sigma z.

    eps = (x / sqrt(ab) - x_0) / sqrt(1/ab - 1).
    """
    schedule = process.schedule
    recip = float(schedule.sqrt_recip_alphas_cumprod[i])
    recipm1 = float(schedule.sqrt_recipm1_alphas_cumprod[i])
    return Row(
        **row_inputs(process, i),
        k_post=recipm1 * float(schedule.sqrt_one_minus_alphas_cumprod[i]),
        a=k_eps * recip / recipm1,
        b=math.sqrt(alpha_bar_to) - k_eps / recipm1,
        k_z=sigma,
        clip=choose_clip(process, clip, network_mean=False),
    )
