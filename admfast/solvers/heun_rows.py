"""Heun's method and Euler's, with or without churn (Karras et al. 2022, "EDM")."""

from __future__ import annotations

import math
from typing import Any

from admfast.checks import finite_float
from admfast.diffusion import GaussianDiffusion, MeanType
from admfast.errors import invalid
from admfast.ops.update import Row, SolverTable
from admfast.solvers.nodes import Node, data_row, nodes_of
from admfast.solvers.solver import Solver, register

LARGEST_CHURN = math.sqrt(2) - 1


@register
def heun(
    *, churn: float = 0.0, churn_least: float = 0.0, churn_most: float = 1e30, churn_noise: float = 1.0
) -> Solver:
    """Return Heun's method of order 2: two evaluations in each step but the last, which takes one.

    churn: S_churn of the paper; 0 is deterministic. churn_least, churn_most: the values of sigma / alpha
    between which noise is added (S_tmin, S_tmax). churn_noise: standard deviation of that noise (S_noise).
    Raises: InvalidArgument.
    """
    options = _checked(churn, churn_least, churn_most, churn_noise)
    return Solver("heun", _heun_table, options, spacing="karras", evaluations=2)


@register
def euler(
    *, churn: float = 0.0, churn_least: float = 0.0, churn_most: float = 1e30, churn_noise: float = 1.0
) -> Solver:
    """Return Euler's method; without churn it is DDIM, guided before x_0 is clipped. Options as in `heun`.

    Raises: InvalidArgument.
    """
    options = _checked(churn, churn_least, churn_most, churn_noise)
    return Solver("euler", _euler_table, options, spacing="karras")


def _checked(churn: float, churn_least: float, churn_most: float, churn_noise: float) -> dict[str, Any]:
    return {
        "churn": finite_float("churn", churn, least=0),
        "churn_least": finite_float("churn_least", churn_least, least=0),
        "churn_most": finite_float("churn_most", churn_most, least=0),
        "churn_noise": finite_float("churn_noise", churn_noise, least=0),
    }


def _heun_table(process: GaussianDiffusion, *, clip: bool, **churn: float) -> SolverTable:
    """Return the table of Heun's method in y = x / alpha and rho = sigma / alpha, where dy / d rho = eps.

    With a prime for the next node: y' = y + (rho' - rho) eps(y, rho), then
    y_next = y + (rho' - rho) (eps(y, rho) + eps(y', rho')) / 2, with eps = (y - x_0) / rho. Each is a row: the
    first saves x and pushes x_0. The last step, to the clean image, is Euler's and returns x_0. With churn, y
    first gets noise that raises rho to (1 + gamma) rho, gamma = min(churn / steps, sqrt(2) - 1); the row
    before adds it. At the first node it is part of the starting noise. A node that churn would raise above the
    process's largest rho gets none. Source: Karras et al. 2022, algorithm 1 and 2.

    process: already respaced. clip: clip x_0 to [-1, 1].
    """
    return _table("heun", process, clip, corrects=True, **churn)


def _euler_table(process: GaussianDiffusion, *, clip: bool, **churn: float) -> SolverTable:
    """Return the table of y_next = y + (rho' - rho) eps(y, rho), with churn (see `_heun_table`)."""
    return _table("euler", process, clip, corrects=False, **churn)


def _table(
    name: str, process: GaussianDiffusion, clip: bool, *, corrects: bool, **churn: float
) -> SolverTable:
    nodes, rows = nodes_of(process), list[Row]()
    # Where each step begins: at its node, or above it after churn.
    begins = [*(_churned(process, node, len(nodes) - 1, **churn) for node in nodes[:-1]), nodes[-1]]
    for i in range(len(nodes) - 1):
        node, following = begins[i], nodes[i + 1]
        arrival = _arrival(following, begins[i + 1], churn["churn_noise"])
        ratio, scale = following.rho / node.rho, begins[i + 1].alpha
        if following.is_end or not corrects:
            euler = dict(a=scale * ratio / node.alpha, b=scale * (1 - ratio))
            rows.append(data_row(process, node, clip, **euler, **arrival))
            continue
        predictor = dict(a=following.alpha * ratio / node.alpha, b=following.alpha * (1 - ratio))
        rows.append(data_row(process, node, clip, **predictor, save=True, p_0=1.0))
        half = scale * (following.rho - node.rho) / 2
        here, before = half / following.rho, half / node.rho
        corrector = dict(a=here / following.alpha, b=-here, a_s=(scale + before) / node.alpha)
        rows.append(data_row(process, following, clip, **corrector, past=[-before], **arrival))
    start = _arrival(nodes[0], begins[0], churn["churn_noise"])
    noise_scale = math.hypot(begins[0].alpha / nodes[0].alpha, start["k_z"])
    integer_t = all(row.t_net.is_integer() for row in rows) and process.schedule.integer_t
    return SolverTable(name, tuple(rows), noise_scale, integer_t)


def _churned(
    process: GaussianDiffusion,
    node: Node,
    steps: int,
    *,
    churn: float,
    churn_least: float,
    churn_most: float,
    churn_noise: float,
) -> Node:
    """Return the node at which a step begins: this one, or one with a larger rho, for which noise is added."""
    assert node.inputs is not None
    gamma = min(churn / steps, LARGEST_CHURN) if churn_least <= node.rho <= churn_most else 0.0
    rho = (1 + gamma) * node.rho
    schedule = process.schedule
    original = schedule if schedule.origin is None else schedule.origin
    if gamma == 0 or rho > original.sqrt_recipm1_alphas_cumprod[-1]:
        return node
    if process.mean_type is MeanType.PREVIOUS_X:
        raise invalid(
            "churn", churn, "0 for a network that predicts the previous x, for whole timesteps only"
        )
    alpha = 1 / math.hypot(1, rho)
    timestep = schedule.network_timestep(schedule.timesteps_at(-2 * math.log(rho)))
    reads = (0.0, 1.0) if process.mean_type is MeanType.START_X else (1 / alpha, -rho)
    inputs = dict(t_net=timestep, t_clf=timestep, k_x=reads[0], k_out=reads[1], index=node.inputs["index"])
    return Node(alpha, rho * alpha, inputs)


def _arrival(node: Node, begin: Node, churn_noise: float) -> dict[str, float]:
    """Return the fields of the row that ends at a node whose next step begins at `begin`: the added noise."""
    added = math.sqrt(max(begin.rho**2 - node.rho**2, 0.0))
    return {"k_z": churn_noise * begin.alpha * added}
