"""Samplers of training timesteps by NumPy's generator, under the names of the published `resample.py`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from admfast.errors import allowed_names, invalid
from admfast.training.timesteps import LossSecondMomentSampler

Array = npt.NDArray[np.float64]


def create_named_schedule_sampler(name: str, diffusion: Any) -> ScheduleSampler:
    """Return the sampler called "uniform" or "loss-second-moment" for a process."""
    if name not in _SAMPLERS:
        raise invalid("schedule_sampler", name, allowed_names(name, _SAMPLERS))
    return _SAMPLERS[name](diffusion)


class ScheduleSampler(ABC):
    """A distribution over the steps of a process."""

    @abstractmethod
    def weights(self) -> Array:
        """Return a positive weight for each step, [S]."""

    def sample(self, batch_size: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Return steps, int64 [N], and factors 1 / (S p), float32 [N], that keep weighted means unbiased.

        Step i is drawn with probability p_i, its weight over the sum of all weights.
        """
        weights = self.weights()
        p = weights / np.sum(weights)
        t = np.random.choice(len(p), size=(batch_size,), p=p)
        factors = torch.from_numpy(1 / (len(p) * p[t])).float()
        return torch.from_numpy(t).long().to(device), factors.to(device)


class UniformSampler(ScheduleSampler):
    """Every step is equally likely."""

    def __init__(self, diffusion: Any) -> None:
        self.diffusion = diffusion
        self._weights = np.ones([diffusion.num_timesteps])

    def weights(self) -> Array:
        return self._weights


class LossAwareSampler(ScheduleSampler):
    """A sampler that learns from the losses of all processes."""

    def update_with_local_losses(self, local_ts: Tensor, local_losses: Tensor) -> None:
        """Learn from the losses [N] at steps [N] of this process and of all others; each must call this."""
        local = list(zip(local_ts.tolist(), local_losses.tolist(), strict=True))
        all_processes: list[Any] = [local]
        if dist.is_initialized() and dist.get_world_size() > 1:
            all_processes = [None] * dist.get_world_size()
            dist.all_gather_object(all_processes, local)
        pairs = [pair for part in all_processes for pair in part]
        self.update_with_all_losses([t for t, _ in pairs], [loss for _, loss in pairs])

    @abstractmethod
    def update_with_all_losses(self, ts: list[int], losses: list[float]) -> None:
        """Learn from losses; every process is given the same ones in the same order."""


class LossSecondMomentResampler(LossAwareSampler):
    """Steps with large losses are drawn more often; see `LossSecondMomentSampler`."""

    def __init__(self, diffusion: Any, history_per_term: int = 10, uniform_prob: float = 0.001) -> None:
        self.diffusion = diffusion
        self._sampler = LossSecondMomentSampler(diffusion.num_timesteps, history_per_term, uniform_prob)

    def weights(self) -> Array:
        return self._sampler.weights().numpy()

    def update_with_all_losses(self, ts: list[int], losses: list[float]) -> None:
        self._sampler.learn(torch.tensor(ts), torch.tensor(losses, dtype=torch.float64))


_SAMPLERS: dict[str, type[Any]] = {
    "uniform": UniformSampler,
    "loss-second-moment": LossSecondMomentResampler,
}
