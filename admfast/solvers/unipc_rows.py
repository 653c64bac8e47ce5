"""UniPC (Zhao et al. 2023): a multistep predictor, and a corrector that costs no evaluation."""

from __future__ import annotations

import math

import numpy as np

from admfast.checks import one_of, whole_number
from admfast.diffusion import GaussianDiffusion
from admfast.ops.update import Row, SolverTable
from admfast.solvers.nodes import Node, data_row, nodes_of, steps_of
from admfast.solvers.solver import Solver, register


@register
def unipc(*, order: int = 2, variant: str = "bh2") -> Solver:
    """Return UniPC in data prediction, with its corrector after every step.

    order: 1, 2 or 3. variant: "bh1" or "bh2", the paper's B(h) = h or e^h - 1. Raises: InvalidArgument.
    """
    options = {
        "order": whole_number("order", order, 1, 3),
        "variant": one_of("variant", variant, ("bh1", "bh2")),
    }
    return Solver("unipc", _table, options, spacing="uniform")


def _table(process: GaussianDiffusion, *, order: int, variant: str, clip: bool) -> SolverTable:
    """Return the table in which a row corrects the x that the row before predicted, and predicts the next.

    A step from node s to t of lambda = log(alpha / sigma), h = lambda_t - lambda_s, is
    x_t = sigma_t / sigma_s x_s - alpha_t (e^-h - 1) m_s - alpha_t B sum_k rho_k (m_k - m_s) / r_k,
    where m are values of x_0, and r_k = (lambda_k - lambda_s) / h. The predictor uses the nodes before s; the
    corrector also t itself, where the network has been evaluated meanwhile. Both are linear in x and the
    values of x_0, so the correction of the row before is added to this row's prediction. The first steps have
    as many values as there are, the last ones have order ..., 3, 2, 1. The last, to the clean image, returns
    x_0. Source: Zhao et al. 2023.

    process: already respaced. clip: clip x_0 to [-1, 1].
    """
    rows = list[Row]()
    correction = np.zeros(4)  # of x, by the weights of x_0 here, h1, h2 and h3
    for node, following, past in steps_of(nodes_of(process), order, lower_last=True):
        a, weights, next_correction = 0.0, np.array([1.0]), np.zeros(4)
        if not following.is_end:
            a = following.sigma / node.sigma
            weights = _weights(node, following, past, variant)
            corrected = _weights(node, following, [*past, following], variant)
            # In the next row this row's values are one older, and x_0 is that of the node it comes to.
            next_correction = np.pad([corrected[-1], *(corrected[:-1] - weights)], (0, 3 - len(weights)))
        total = a * correction
        total[: len(weights)] += weights
        rows.append(data_row(process, node, clip, a=a, b=float(total[0]), past=total[1:].tolist(), p_0=1.0))
        correction = next_correction
    return SolverTable("unipc", tuple(rows), integer_t=process.schedule.integer_t)


def _weights(node: Node, following: Node, others: list[Node], variant: str) -> np.ndarray:
    """Return the weights of x_0 at this node and at the others in x at the following node."""
    h, alpha = following.lam - node.lam, following.alpha
    phi = math.expm1(-h)
    b_h = -h if variant == "bh1" else phi
    r = np.array([(other.lam - node.lam) / h for other in others])
    rho = _rho(r, h, b_h)
    differences = -alpha * b_h * rho / r
    return np.array([-alpha * phi - differences.sum(), *differences])


def _rho(r: np.ndarray, h: float, b_h: float) -> np.ndarray:
    """Return the solution of sum_k rho_k r_k^(j-1) = j! phi_{j+1}(-h) (-h) / B, j = 1..len(r).

    With one equation the paper takes 1/2 in place of the solution, which has the same order.
    """
    if len(r) == 1:
        return np.array([0.5])
    right, phi = [], math.expm1(-h) / -h - 1
    for j in range(1, len(r) + 1):
        right.append(phi * math.factorial(j) / b_h)
        phi = phi / -h - 1 / math.factorial(j + 1)
    return np.linalg.solve(np.vander(r, increasing=True).T, np.array(right))
