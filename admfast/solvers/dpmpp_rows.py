"""DPM-Solver++ (Lu et al. 2022), multistep."""

from __future__ import annotations

import math

import numpy as np

from admfast.checks import boolean, whole_number
from admfast.diffusion import GaussianDiffusion
from admfast.errors import invalid
from admfast.ops.update import Row, SolverTable
from admfast.solvers.nodes import Node, data_row, nodes_of, steps_of
from admfast.solvers.solver import Solver, register


@register
def dpmpp(*, order: int = 2, sde: bool = False) -> Solver:
    """Return multistep DPM-Solver++: "2M" for order 2, "3M" for order 3, "SDE-2M" with `sde`.

    order: 1 (DDIM), 2 or 3; with `sde` 1 or 2. sde: add noise in every step but the last.
    Raises: InvalidArgument.
    """
    options = {"order": whole_number("order", order, 1, 3), "sde": boolean("sde", sde)}
    if options["sde"] and options["order"] == 3:
        raise invalid("order", 3, "1 or 2 with sde")
    return Solver("dpmpp", _table, options, spacing="uniform")


def _table(process: GaussianDiffusion, *, order: int, sde: bool, clip: bool) -> SolverTable:
    """Return the table of x_next = sigma' / sigma x - alpha' (e^-h - 1) D, h = lambda' - lambda.

    lambda = log(alpha / sigma), and a prime marks the next node. D extrapolates x_0 from its last `order`
    values m_0, m_1, m_2. Order 2: D = m_0 + (m_0 - m_1) / (2 r_0), r_0 = (lambda - lambda_1) / h. Order 3
    adds the second difference as the published "3M" does, with half of Taylor's weight: so its error falls
    with order 2, but is smaller. The SDE form is
    x_next = sigma' / sigma e^-h x + alpha' (1 - e^-2h) D + sigma' sqrt(1 - e^-2h) z.
    The first steps have as many values as there are; the last but one has order 2 at most, and the last, to
    the clean image, returns x_0. Source: Lu et al. 2022, algorithm 2 for 2M.

    process: already respaced. clip: clip x_0 to [-1, 1].
    """
    rows = list[Row]()
    for node, following, past in steps_of(nodes_of(process), order, lower_last=True):
        if following.is_end:
            a, weights, k_z = 0.0, np.ones(1), 0.0
        elif sde:
            h = following.lam - node.lam
            a = following.sigma / node.sigma * math.exp(-h)
            weights = -following.alpha * math.expm1(-2 * h) * _middle(node, following, past)
            k_z = following.sigma * math.sqrt(-math.expm1(-2 * h))
        else:
            a, weights, k_z = following.sigma / node.sigma, _weights(node, following, past), 0.0
        rows.append(
            data_row(
                process, node, clip, a=a, b=float(weights[0]), past=weights[1:].tolist(), k_z=k_z, p_0=1.0
            )
        )
    return SolverTable("dpmpp", tuple(rows), integer_t=process.schedule.integer_t)


def _middle(node: Node, following: Node, past: list[Node]) -> np.ndarray:
    """Return the weights of m_0 (and m_1) in x_0 extrapolated to the middle of the step."""
    if not past:
        return np.ones(1)
    slope = (following.lam - node.lam) / (node.lam - past[0].lam) / 2
    return np.array([1 + slope, -slope])


def _weights(node: Node, following: Node, past: list[Node]) -> np.ndarray:
    """Return the weights of m_0, m_1, ... in x_next."""
    h, alpha = following.lam - node.lam, following.alpha
    phi = math.expm1(-h)
    if len(past) < 2:
        return -alpha * phi * _middle(node, following, past)
    r0, r1 = (node.lam - past[0].lam) / h, (past[0].lam - past[1].lam) / h
    newest, older = np.array([1, -1, 0]) / r0, np.array([0, 1, -1]) / r1  # the two divided differences
    slope = newest + r0 / (r0 + r1) * (newest - older)
    curvature = (newest - older) / (r0 + r1)
    m0 = np.array([1.0, 0, 0])
    return alpha * (-phi * m0 + (phi / h + 1) * slope - ((phi + h) / h**2 - 0.5) * curvature)
