"""Draw the timesteps of training, uniformly or in proportion to the size of the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from admfast import checks
from admfast.errors import invalid
from admfast.training.recipe import SAMPLERS


class UniformSampler:
    """Sampler for which all timesteps are equally likely; it has no state."""

    def __init__(self, steps: int) -> None:
        self.steps = checks.whole_number("steps", steps, 1)

    needs_losses = False

    def weights(self) -> Tensor:
        """Return the probability of each timestep up to a factor, float64 [steps]."""
        return torch.ones(self.steps, dtype=torch.float64)

    def choose(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Return timesteps for uniform numbers in [0, 1), and factors that keep the mean loss unbiased.

        uniform: float64 [N]. t = floor(u * steps); the factors are 1.
        Returns int64 [N] and float32 [N].
        """
        t = (uniform * self.steps).long().clamp(max=self.steps - 1)
        return t, torch.ones(len(t))

    def learn(self, t: Tensor, losses: Tensor) -> None:
        """Update the state with the timesteps and losses of a step, [N] each, in the order of the samples."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state, on which the next step depends."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state."""


class LossSecondMomentSampler(UniformSampler):
    """Sampler with p(t) proportional to sqrt(E[L_t^2]) over the last losses at t, mixed with a uniform share.

    It is uniform until every timestep has a full history. Source: Nichol and Dhariwal 2021, eq. 18;
    `LossSecondMomentResampler` of the published code.

    history: number of losses kept for each timestep. uniform_share: weight of the uniform distribution in the
    mixture.
    """

    needs_losses = True

    def __init__(self, steps: int, history: int = 10, uniform_share: float = 0.001) -> None:
        super().__init__(steps)
        self.uniform_share = uniform_share
        self.losses = torch.zeros(
            steps, checks.whole_number("history", history, 1), dtype=torch.float64, device="cpu"
        )
        self.counts = torch.zeros(steps, dtype=torch.int64, device="cpu")

    @property
    def warmed_up(self) -> bool:
        """Tell whether every timestep has a full history."""
        return bool((self.counts == self.losses.shape[1]).all())

    def weights(self) -> Tensor:
        if not self.warmed_up:
            return super().weights()
        weights = self.losses.square().mean(dim=1).sqrt()
        return weights / weights.sum() * (1 - self.uniform_share) + self.uniform_share / self.steps

    def choose(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Return timesteps and factors as `UniformSampler` does; t is the first with P(T <= t) above u."""
        p = self.weights()
        p = p / p.sum()
        t = torch.searchsorted(p.cumsum(0), uniform, right=True).clamp(max=self.steps - 1)
        return t, (1 / (self.steps * p[t])).float()

    def learn(self, t: Tensor, losses: Tensor) -> None:
        for step, loss in zip(t.tolist(), losses.double().tolist(), strict=True):
            if not abs(loss) < float("inf"):  # in a step that is skipped
                continue
            count = int(self.counts[step])
            if count == self.losses.shape[1]:
                self.losses[step, :-1] = self.losses[step, 1:].clone()
                self.losses[step, -1] = loss
            else:
                self.losses[step, count] = loss
                self.counts[step] = count + 1

    def state_dict(self) -> dict[str, Tensor]:
        return {"losses": self.losses.clone(), "counts": self.counts.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["losses"].shape != self.losses.shape:
            raise invalid("sampler", tuple(state["losses"].shape), f"a history of {tuple(self.losses.shape)}")
        self.losses, self.counts = state["losses"].clone(), state["counts"].clone()


def timestep_sampler(name: str, steps: int) -> UniformSampler:
    """Return the sampler called "uniform" or "loss-second-moment" for a process of `steps` steps."""
    checks.one_of("sampler", name, SAMPLERS)
    return UniformSampler(steps) if name == "uniform" else LossSecondMomentSampler(steps)
