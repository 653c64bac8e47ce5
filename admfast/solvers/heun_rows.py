"""Heun's method and Euler's, with or without churn (Karras et al. 2022, "EDM")."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from admfast.checks import finite_float, interval
from admfast.diffusion import GaussianDiffusion, MeanType
from admfast.errors import invalid
from admfast.ops.update import Row, SolverTable
from admfast.solvers.nodes import Node, data_row, nodes_of
from admfast.solvers.solver import Solver, register

LARGEST_CHURN = math.sqrt(2) - 1
Range = Sequence[float] | None


@register
def heun(
    *, churn: float = 0.0, churn_range: tuple[float, float] | None = None, churn_noise: float = 1.0
) -> Solver:
    """Return Heun's method of order 2: two evaluations in each step but the last, which takes one.

    churn: S_churn of the paper; 0 is deterministic. churn_range: the least and greatest sigma / alpha at
    which noise is added (S_tmin, S_tmax); None: everywhere. churn_noise: standard deviation of that noise
    (S_noise). Raises: InvalidArgument.
    """
    options = _check_churn(churn, churn_range, churn_noise)
    return Solver("heun", _heun_table, options, spacing="karras", evaluations=2)


@register
def euler(
    *, churn: float = 0.0, churn_range: tuple[float, float] | None = None, churn_noise: float = 1.0
) -> Solver:
    """Return Euler's method; without churn it is DDIM, guided before x_0 is clipped. Options as in `heun`.

    Raises: InvalidArgument.
    """
    return Solver("euler", _euler_table, _check_churn(churn, churn_range, churn_noise), spacing="karras")


def _check_churn(churn: float, churn_range: object, churn_noise: float) -> dict[str, Any]:
    return {
        "churn": finite_float("churn", churn, least=0),
        "churn_range": None if churn_range is None else interval("churn_range", churn_range),
        "churn_noise": finite_float("churn_noise", churn_noise, least=0),
    }


def _heun_table(
    process: GaussianDiffusion, *, clip: bool, churn: float, churn_range: Range, churn_noise: float
) -> SolverTable:
    """Return the table of Heun's method in y = x / alpha and rho = sigma / alpha, where dy / d rho = eps.

    With a prime for the next node: y' = y + (rho' - rho) eps(y, rho), then
    y_next = y + (rho' - rho) (eps(y, rho) + eps(y', rho')) / 2, with eps = (y - x_0) / rho. Each is a row;
    the first saves x and pushes x_0. The last step, to the clean image, is Euler's and returns x_0. With
    churn, y first gets noise that raises rho to (1 + gamma) rho, gamma = min(churn / steps, sqrt(2) - 1);
    the row before adds it. At the first node it is part of the starting noise. A node that churn would raise
    above the process's largest rho gets none. Source: Karras et al. 2022, algorithm 1 and 2.

    process: already respaced. clip: clip x_0 to [-1, 1].
    """
    return _table("heun", process, clip, churn, churn_range, churn_noise)


def _euler_table(
    process: GaussianDiffusion, *, clip: bool, churn: float, churn_range: Range, churn_noise: float
) -> SolverTable:
    """Return the table of y_next = y + (rho' - rho) eps(y, rho), with churn (see `_heun_table`)."""
    return _table("euler", process, clip, churn, churn_range, churn_noise)


def _table(
    name: str, process: GaussianDiffusion, clip: bool, churn: float, churn_range: Range, churn_noise: float
) -> SolverTable:
    """Return the table of a method by name."""
    nodes, rows = nodes_of(process), list[Row]()
    begins = _churned_nodes(process, nodes, churn, churn_range)
    for i in range(len(nodes) - 1):
        node, following, scale = begins[i], nodes[i + 1], begins[i + 1].alpha
        k_z = churn_noise * _added(following, begins[i + 1])
        ratio = following.rho / node.rho
        if following.is_end or name == "euler":
            a, b = scale * ratio / node.alpha, scale * (1 - ratio)
            rows.append(data_row(process, node, clip, a=a, b=b, k_z=k_z))
            continue
        a, b = following.alpha * ratio / node.alpha, following.alpha * (1 - ratio)
        rows.append(data_row(process, node, clip, a=a, b=b, save=True, p_0=1.0))
        half = scale * (following.rho - node.rho) / 2
        here, before = half / following.rho, half / node.rho
        a, a_s = here / following.alpha, (scale + before) / node.alpha
        rows.append(data_row(process, following, clip, a=a, b=-here, past=[-before], a_s=a_s, k_z=k_z))
    noise_scale = math.hypot(begins[0].alpha / nodes[0].alpha, churn_noise * _added(nodes[0], begins[0]))
    integer_t = process.schedule.integer_t and all(row.t_net.is_integer() for row in rows)
    return SolverTable(name, tuple(rows), noise_scale, integer_t)


def _churned_nodes(
    process: GaussianDiffusion, nodes: list[Node], churn: float, churn_range: Range
) -> list[Node]:
    """Return where each step begins: its node, or one with a larger rho after noise is added; and the end."""
    schedule = process.schedule
    least, most = churn_range or (0.0, math.inf)
    largest = schedule.original.sqrt_recipm1_alphas_cumprod[-1]
    gamma = min(churn / (len(nodes) - 1), LARGEST_CHURN)
    begins = []
    for node in nodes:
        rho = (1 + gamma) * node.rho
        is_raised = least <= node.rho <= most and node.rho < rho <= largest
        begins.append(_raised(process, node, rho) if is_raised else node)
    return begins


def _raised(process: GaussianDiffusion, node: Node, rho: float) -> Node:
    """Return the node with this rho, between timesteps; its rows report the step of `node`."""
    if process.mean_type is MeanType.PREVIOUS_X:
        raise invalid("churn", rho, "0 for a network that predicts the previous x, for whole timesteps only")
    assert node.inputs is not None
    alpha, schedule = 1 / math.hypot(1, rho), process.schedule
    timestep = float(schedule.timesteps_at(-2 * math.log(rho)))
    seen = schedule.network_timestep(timestep)
    k_x, k_out = (0.0, 1.0) if process.mean_type is MeanType.START_X else (1 / alpha, -rho)
    index = node.inputs["index"]
    inputs = dict(t_net=seen, t_clf=seen, k_x=k_x, k_out=k_out, index=index, timestep=timestep)
    return Node(alpha, rho * alpha, inputs)


def _added(node: Node, begin: Node) -> float:
    """Return the standard deviation of the noise that x gets between a node and where its step begins."""
    return begin.alpha * math.sqrt(max(begin.rho**2 - node.rho**2, 0.0))
