"""Explicit functions that replace the network and the classifier in some golden sampling cases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from admfast.diffusion import GaussianDiffusion, MeanType, VarType, make_schedule

DENOISED_FNS: dict[str, Callable[[Tensor], Tensor]] = {
    "times_0.9": lambda x: 0.9 * x,
    "clamp_0.6": lambda x: x.clamp(-0.6, 0.6),
    "times_1.7": lambda x: 1.7 * x,
}


def denoised_fn(name: str | None) -> Callable[[Tensor], Tensor] | None:
    """Return the function that a case's `denoised_fn` names, or None."""
    return None if name is None else DENOISED_FNS[name]


def build_diffusion(settings: Mapping[str, Any]) -> GaussianDiffusion:
    """Return the process of a case's `diffusion` entry."""
    schedule = make_schedule(
        settings["schedule"], settings["steps"], settings["respacing"], settings["rescale"]
    )
    return GaussianDiffusion(schedule, settings["mean"], settings["var"], settings["loss"])


def _column(values: Tensor, x: Tensor) -> Tensor:
    """Reshape [N] to [N, 1, 1, 1], in x's dtype."""
    return values.to(x.dtype).view(-1, 1, 1, 1)


def _phase(x: Tensor, y: Tensor | None) -> Tensor:
    """Return p = 0.7 c + 0.3 h - 0.2 w, plus 0.5 y if there are labels."""
    _, c, h, w = (torch.arange(size, dtype=x.dtype, device=x.device) for size in x.shape)
    p = 0.7 * c.view(-1, 1, 1) + 0.3 * h.view(-1, 1) - 0.2 * w
    return p if y is None else p + 0.5 * _column(y, x)


@dataclass
class AnalyticModel:
    """A function in place of a network: model(x, t, y) gives the mean and, if learned, the variance.

    t is the timestep that a network gets. scale_mean and scale_var multiply the two parts. `seen` records
    every t.
    """

    mean_type: MeanType
    var_type: VarType
    scale_mean: Tensor | float = 1.0
    scale_var: Tensor | float = 1.0
    seen: list[Tensor] = field(default_factory=list)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        self.seen.append(t)
        u, p = _column(t, x) / 1000, _phase(x, y)
        mean = self.scale_mean * self._mean(x, u, p)
        if not self.var_type.learned:
            return mean
        if self.var_type is VarType.LEARNED_RANGE:
            variance = torch.tanh(0.8 * x - 2 * u + 0.4 * torch.cos(p))
        else:
            variance = -4 + 3 * u + 0.5 * torch.sin(x + p)
        return torch.cat([mean, self.scale_var * variance], dim=1)

    def _mean(self, x: Tensor, u: Tensor, p: Tensor) -> Tensor:
        if self.mean_type is MeanType.START_X:
            return 0.8 * torch.sin(1.3 * (1 - 0.5 * u) * x + p)
        if self.mean_type is MeanType.PREVIOUS_X:
            return 0.98 * x + 0.02 * torch.sin(x + 6 * u + p)
        e = torch.exp(-10 * u**2)
        k = torch.sqrt(1.0001 - e) / (1 - 0.75 * e)
        return k * x + (0.4 * e + 0.01) * torch.sin(2 * x + 6 * u + p)


def analytic_model(diffusion: GaussianDiffusion) -> AnalyticModel:
    """Return the model for this process's parameterisation."""
    return AnalyticModel(diffusion.mean_type, diffusion.var_type)


def guidance(x: Tensor, t: Tensor, y: Tensor | None, scale: float) -> Tensor:
    """Return the function used in place of scale * grad log p(y | x) at x and a classifier's timestep t."""
    u, p = _column(t, x) / 1000, _phase(x, y)
    label = 0.0 if y is None else 0.2 * _column(y, x)
    return scale * (0.3 * torch.cos(x + 3 * u + 0.5 * p) - 0.1 * (x - label))
