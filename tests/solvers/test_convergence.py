"""Solvers converge with the order of their papers, on a Gaussian mixture whose score is known exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from admfast.diffusion import DiffusionConfig, GaussianDiffusion
from admfast.ops import SamplerState, pack, sampler_step
from admfast.solvers import Solver, ddim, deis, dpmpp, euler, heun, ipndm, unipc

WEIGHTS, MEANS, STDS = (
    torch.tensor(values, dtype=torch.float64) for values in ([0.3, 0.7], [-0.6, 0.5], [0.5, 0.6])
)
FIRST, LAST = 800.0, 150.0  # timesteps between which the error is measured
LAST_EVENLY = 500.0  # later, equal steps of rho are too few at small rho
COUNTS = (48, 96, 192)


def eps_of(x: Tensor, alpha: float, sigma: float) -> Tensor:
    """Return the noise that a perfect network predicts: -sigma times the score of the mixture at x."""
    variance = (alpha * STDS) ** 2 + sigma**2
    distance = x[..., None] - alpha * MEANS
    log_density = torch.log(WEIGHTS) - (torch.log(variance) + distance**2 / variance) / 2
    return sigma * (torch.softmax(log_density, -1) * distance / variance).sum(-1)


def follow(y: Tensor, rho: float, to: float, steps: int) -> Tensor:
    """Return y = x / alpha after the probability flow dy / d rho = eps, by Runge-Kutta of order 4."""

    def slope(log_rho: float, y: Tensor) -> Tensor:
        rho = math.exp(log_rho)
        alpha = 1 / math.hypot(1, rho)
        return rho * eps_of(alpha * y, alpha, rho * alpha)

    h = (math.log(to) - math.log(rho)) / steps
    for i in range(steps):
        at = math.log(rho) + i * h
        k1 = slope(at, y)
        k2 = slope(at + h / 2, y + h / 2 * k1)
        k3 = slope(at + h / 2, y + h / 2 * k2)
        k4 = slope(at + h, y + h * k3)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return y


@dataclass
class Trial:
    """A solver, the order that it must have, and how its error is measured.

    warm: steps whose result is replaced by the exact one, because they have less history. tail: steps that
    are left out at the end, because their order is lower. evenly: the steps are equal in rho, not in t.
    """

    solver: Solver
    order: int
    warm: int = 0
    tail: int = 1
    evenly: bool = False
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = f"{self.solver}"

    def process(self, count: int) -> GaussianDiffusion:
        """Return the process of count + 1 timesteps."""
        config = DiffusionConfig(steps=1000)
        if not self.evenly:
            return config.build(np.linspace(LAST, FIRST, count + 1).tolist())
        schedule = config.build().schedule
        rho = np.exp(-schedule.log_snr([LAST_EVENLY, FIRST]) / 2)
        return config.build(schedule.timesteps_at(-2 * np.log(np.linspace(*rho, count + 1))).tolist())

    def error(self, count: int) -> float:
        """Return the largest error of x at the last node but `tail`."""
        process = self.process(count)
        table, schedule = self.solver.table(process, clip=False), process.schedule
        alphas, sigmas = schedule.sqrt_alphas_cumprod[::-1], schedule.sqrt_one_minus_alphas_cumprod[::-1]
        rhos, last = sigmas / alphas, count + 1 - self.tail
        x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(1, 1, 9)
        exact = [x / alphas[0]]
        for i in range(self.warm):
            exact.append(follow(exact[-1], rhos[i], rhos[i + 1], 50))
        truth = follow(exact[-1], rhos[self.warm], rhos[last], 1000) * alphas[last]
        state, packed = SamplerState.start(x, table.rows), pack(table.rows, dtype=torch.float64)
        rows_of_a_step = self.solver.evaluations
        for i in range(last * rows_of_a_step):
            step, is_second = divmod(i, rows_of_a_step)
            node = step + is_second
            out = eps_of(state.x, alphas[node], sigmas[node])
            sampler_step(state, out, packed, i, impl="reference")
            if step + 1 < len(exact):
                state.x.copy_(exact[step + 1] * alphas[step + 1])
        return float((state.x - truth).abs().max())


TRIALS = [
    Trial(ddim(), 1),
    Trial(euler(), 1),
    Trial(heun(), 2),
    Trial(dpmpp(order=1), 1),
    Trial(dpmpp(order=2), 2, warm=1),
    # The published "3M" takes half of Taylor's weight for the second difference, so its order is 2.
    Trial(dpmpp(order=3), 2, warm=2, tail=2),
    # The corrector of order p raises the order by one.
    Trial(unipc(order=1), 2),
    Trial(unipc(order=2), 3, warm=1, tail=2),
    Trial(unipc(order=2, variant="bh1"), 3, warm=1, tail=2),
    Trial(unipc(order=3), 4, warm=2, tail=3),
    Trial(deis(order=1), 1),
    Trial(deis(order=2), 2, warm=1),
    Trial(deis(order=3), 3, warm=2),
    Trial(deis(order=4), 4, warm=3),
    Trial(deis(order=4, variable="log-rho"), 4, warm=3),
    Trial(ipndm(order=1), 1),
    Trial(ipndm(order=2), 2, warm=1, evenly=True),
    Trial(ipndm(order=3), 3, warm=2, evenly=True),
    Trial(ipndm(order=4), 4, warm=3, evenly=True),
    # With unequal steps the weights for equal ones leave an error of second order.
    Trial(ipndm(order=4), 2, warm=3),
]


@pytest.mark.parametrize("trial", TRIALS, ids=lambda t: f"{t.name}-{'even' if t.evenly else 't'}")
def test_it_converges_with_its_order(trial):
    errors = [trial.error(count) for count in COUNTS]
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert round(orders[-1]) == trial.order, (errors, orders)
