"""What a solver is: rows of the one update, and the scale of the noise that it starts from."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from admfast.diffusion import GaussianDiffusion, MeanType, VarType
from admfast.errors import InvalidArgument, invalid
from admfast.ops.sampler_step import Clip, Row


@dataclass(frozen=True)
class SolverTable:
    """A solver made concrete for one schedule.

    rows: in the order in which they run. scale: x_T = scale * z. integer_t: the network sees whole timesteps
    (int64), as where the schedule isn't rescaled.
    """

    solver: str
    rows: tuple[Row, ...]
    scale: float = 1.0
    integer_t: bool = True

    def __post_init__(self) -> None:
        for i, row in enumerate(self.rows):
            for field in dataclasses.fields(row):
                value = getattr(row, field.name)
                # l0 alone may be -inf: a variance of zero.
                if math.isnan(value) or (math.isinf(value) and field.name != "l0"):
                    raise InvalidArgument(
                        f"{self.solver}: row {i} (step {row.index}) has {field.name}={value}: "
                        "alpha_bar is 0 there; keep fewer steps or take another schedule"
                    )

    def __len__(self) -> int:
        return len(self.rows)

    def from_step(self, index: int) -> SolverTable:
        """The rows from the one whose step is `index` on (to begin from a noised image)."""
        for i, row in enumerate(self.rows):
            if row.index == index:
                return dataclasses.replace(self, rows=self.rows[i:])
        raise invalid("index", index, f"a step of the table: {[row.index for row in self.rows]}")


def x0_coefficients(diffusion: GaussianDiffusion, i: int) -> tuple[float, float]:
    """(k_x, k_out) with x0 = k_x x + k_out out at step i, by what the network predicts."""
    s = diffusion.schedule
    if diffusion.mean_type is MeanType.EPSILON:
        return float(s.sqrt_recip_alphas_cumprod[i]), -float(s.sqrt_recipm1_alphas_cumprod[i])
    if diffusion.mean_type is MeanType.START_X:
        return 0.0, 1.0
    coef1, coef2 = float(s.posterior_mean_coef1[i]), float(s.posterior_mean_coef2[i])
    return -coef2 / coef1, 1.0 / coef1


def log_variance_coefficients(diffusion: GaussianDiffusion, i: int) -> tuple[float, float]:
    """(l0, l1) with log sigma^2 = l0 + l1 v at step i."""
    s = diffusion.schedule
    low, high = float(s.posterior_log_variance_clipped[i]), math.log(s.betas[i])
    if diffusion.var_type is VarType.LEARNED:
        return 0.0, 1.0
    if diffusion.var_type is VarType.LEARNED_RANGE:
        return (low + high) / 2, (high - low) / 2
    if diffusion.var_type is VarType.FIXED_SMALL:
        with np.errstate(divide="ignore"):
            return float(np.log(s.posterior_variance[i])), 0.0
    first = s.posterior_variance[1] if s.num_timesteps > 1 else s.betas[0]
    return math.log(first if i == 0 else s.betas[i]), 0.0


def clip_of(diffusion: GaussianDiffusion, clip: bool, network_mean: bool) -> Clip:
    """How a clipped step limits x0; with `network_mean` the update follows the network, not that x0."""
    if not clip:
        return Clip.NONE
    return Clip.REPORTED if network_mean and diffusion.mean_type is MeanType.PREVIOUS_X else Clip.USED
