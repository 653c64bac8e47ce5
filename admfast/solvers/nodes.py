"""The points of a process between which a solver steps, and the row of a linear step between two of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from admfast.diffusion import GaussianDiffusion
from admfast.errors import InvalidArgument
from admfast.ops.update import HISTORY, Row
from admfast.solvers.solver import choose_clip, row_inputs


@dataclass(frozen=True)
class Node:
    """A point of a process, at which x = alpha x_0 + sigma eps.

    inputs: what a row at this node reads (see `row_inputs`); None for the end, the clean image.
    """

    alpha: float
    sigma: float
    inputs: Mapping[str, Any] | None = None

    @property
    def lam(self) -> float:
        """Half the log-SNR, log(alpha / sigma); infinite at the end."""
        return math.log(self.alpha / self.sigma) if self.sigma else math.inf

    @property
    def rho(self) -> float:
        """The noise relative to the signal, sigma / alpha."""
        return self.sigma / self.alpha

    @property
    def is_end(self) -> bool:
        return self.inputs is None


END = Node(1.0, 0.0)


def nodes_of(process: GaussianDiffusion) -> list[Node]:
    """Return the points of a process, respaced already, from the noisiest to the cleanest, and the end.

    Raises: InvalidArgument if there is no signal at the noisiest.
    """
    schedule = process.schedule
    if schedule.alphas_cumprod[-1] == 0:
        last = schedule.num_timesteps - 1
        raise InvalidArgument(f"step {last}: alpha_bar is 0 there; keep fewer steps or take another schedule")
    alphas, sigmas = schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod
    steps = reversed(range(len(alphas)))
    return [Node(float(alphas[i]), float(sigmas[i]), row_inputs(process, i)) for i in steps] + [END]


def steps_of(
    nodes: list[Node], order: int, lower_last: bool = False
) -> Iterator[tuple[Node, Node, list[Node]]]:
    """Yield each step of a multistep solver: its node, the next one, and those before it, newest first.

    Before it are order - 1 nodes, or as many as there are. lower_last: each of the last steps has one less,
    so that the last, to the end, has none.
    """
    for i, (node, following) in enumerate(itertools.pairwise(nodes)):
        count = min(order, len(nodes) - 1 - i) - 1 if lower_last else order - 1
        yield node, following, nodes[max(i - count, 0) : i][::-1]


def data_row(
    process: GaussianDiffusion,
    node: Node,
    clip: bool,
    *,
    a: float,
    b: float,
    past: Sequence[float] = (),
    **others: Any,
) -> Row:
    """Return the row of x_next = a x + b x_0 + sum_j past[j] h_j at a node, without the learned variance.

    Guidance changes eps by -sigma g, and so x_0 by sigma^2 / alpha g, before x_0 is clipped.
    Source: Dhariwal & Nichol 2021, algorithm 2; Lu et al. 2022, "DPM-Solver++".
    """
    c1, c2, c3 = [*past, *[0.0] * (HISTORY - len(past))]
    coefficients: dict[str, Any] = dict(a=a, b=b, c1=c1, c2=c2, c3=c3, k_pre=node.sigma**2 / node.alpha)
    limit = choose_clip(process, clip, network_mean=False)
    assert node.inputs is not None
    return Row(**node.inputs, **coefficients, clip=limit, **others)


def noise_row(
    process: GaussianDiffusion, node: Node, clip: bool, *, a: float, weights: Sequence[float]
) -> Row:
    """Return the row of x_next = a x + weights[0] eps + sum_j weights[j] h_j, where h are past values of eps.

    eps = (x - alpha x_0) / sigma, with the guided and clipped x_0; the row pushes it.
    """
    first, *past = weights
    p_x, p_0 = 1 / node.sigma, -node.alpha / node.sigma
    return data_row(process, node, clip, a=a + first * p_x, b=first * p_0, past=past, p_x=p_x, p_0=p_0)
