"""DEIS and iPNDM (Zhang & Chen 2022): exponential multistep methods on past values of eps."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from admfast.checks import one_of, whole_number
from admfast.diffusion import GaussianDiffusion
from admfast.ops.update import Row, SolverTable
from admfast.solvers.nodes import Node, data_row, nodes_of, noise_row, steps_of
from admfast.solvers.solver import Solver, register

# Weights of the Adams-Bashforth methods of orders 1 to 4, for equal steps.
ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


@register
def deis(*, order: int = 4, variable: str = "t") -> Solver:
    """Return DEIS: eps is extrapolated by a polynomial through its last `order` values.

    order: 1 (DDIM) to 4; "tAB3" of the paper is order 4, a polynomial of degree 3. variable: that of the
    polynomial, "t" or "log-rho", with rho = sigma / alpha. Raises: InvalidArgument.
    """
    options = {
        "order": whole_number("order", order, 1, 4),
        "variable": one_of("variable", variable, ("t", "log-rho")),
    }
    return Solver("deis", _deis_table, options, spacing="uniform")


@register
def ipndm(*, order: int = 4) -> Solver:
    """Return iPNDM: Adams-Bashforth methods for equal steps, whatever the steps are. order: 1 (DDIM) to 4.

    Raises: InvalidArgument.
    """
    return Solver("ipndm", _ipndm_table, {"order": whole_number("order", order, 1, 4)}, spacing="uniform")


def _deis_table(process: GaussianDiffusion, *, order: int, variable: str, clip: bool) -> SolverTable:
    """Return the table of x_next / alpha' = x / alpha + sum_j C_j eps_j, C_j = int_rho^rho' L_j(u) d rho.

    rho = sigma / alpha, and a prime marks the next node. L_j are the Lagrange polynomials through the values
    of the variable u at the last `order` nodes. The first steps have as many values as there are; the last,
    to the clean image, has order 1 and returns x_0. Source: Zhang & Chen 2022.

    process: already respaced. clip: clip x_0 to [-1, 1].
    """

    def weights(node: Node, following: Node, past: list[Node]) -> np.ndarray:
        u, step_rho = _quadrature(process, node, following, variable)
        known = [_variable(process, each, variable) for each in (node, *past)]
        return np.array([(_lagrange(known, j, u) * step_rho).sum() for j in range(len(known))])

    return _table("deis", process, order, clip, weights)


def _ipndm_table(process: GaussianDiffusion, *, order: int, clip: bool) -> SolverTable:
    """Return the table of x_next / alpha' = x / alpha + (rho' - rho) sum_j w_j eps_j.

    w are the weights of the Adams-Bashforth method of this order; rho = sigma / alpha. Orders rise and end as
    in DEIS. Source: Zhang & Chen 2022.

    process: already respaced. clip: clip x_0 to [-1, 1].
    """

    def weights(node: Node, following: Node, past: list[Node]) -> np.ndarray:
        return (following.rho - node.rho) * np.array(ADAMS_BASHFORTH[len(past)])

    return _table("ipndm", process, order, clip, weights)


def _table(
    name: str, process: GaussianDiffusion, order: int, clip: bool, weights: Callable[..., np.ndarray]
) -> SolverTable:
    """Return the table of x_next / alpha' = x / alpha + sum_j weights[j] eps_j, newest eps first."""
    rows = list[Row]()
    for node, following, past in steps_of(nodes_of(process), order):
        if following.is_end:
            rows.append(data_row(process, node, clip, a=0.0, b=1.0))
            continue
        scaled = following.alpha * weights(node, following, past)
        a = following.alpha / node.alpha
        rows.append(noise_row(process, node, clip, a=a, weights=scaled.tolist()))
    return SolverTable(name, tuple(rows), integer_t=process.schedule.integer_t)


def _variable(process: GaussianDiffusion, node: Node, variable: str) -> float:
    """Return the variable of the polynomial at a node."""
    return _timestep(process, node) if variable == "t" else -node.lam


def _timestep(process: GaussianDiffusion, node: Node) -> float:
    """Return the timestep of the original process at a node."""
    assert node.inputs is not None
    return float(process.schedule.timestep_map[node.inputs["index"]])


def _quadrature(
    process: GaussianDiffusion, node: Node, following: Node, variable: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return points u and weights w with sum f(u) w = int f d rho over the step.

    Between two timesteps of the original process log rho is linear in t, and there f(u) is a polynomial times
    an exponential, for which Gauss's rule of 4 points is exact to float64.
    """
    schedule = process.schedule
    begin, end = (_timestep(process, each) for each in (node, following))
    whole = np.arange(np.floor(end) + 1, np.ceil(begin))
    borders = np.concatenate([[end], whole, [begin]])
    points, point_weights = np.polynomial.legendre.leggauss(4)
    lengths = np.diff(borders)[:, None]
    t = borders[:-1, None] + lengths * (points + 1) / 2
    log_rho_at_borders = -schedule.original.log_snr(borders) / 2
    slope = np.diff(log_rho_at_borders)[:, None] / lengths
    log_rho = log_rho_at_borders[:-1, None] + slope * (t - borders[:-1, None])
    # From the node down to the following one, so against the direction of t.
    step_rho = -np.exp(log_rho) * slope * lengths * point_weights / 2
    return t if variable == "t" else log_rho, step_rho


def _lagrange(known: list[float], j: int, u: np.ndarray) -> np.ndarray:
    """Return the polynomial that is 1 at known[j] and 0 at the others, at u."""
    factors = [(u - other) / (known[j] - other) for k, other in enumerate(known) if k != j]
    return np.prod(factors, axis=0) if factors else np.ones_like(u)
