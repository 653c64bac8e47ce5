"""Processes of fewer steps, under the names of the published `respace.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from admfast import diffusion
from admfast.compat.guided_diffusion.change_guard import record_methods
from admfast.compat.guided_diffusion.gaussian_diffusion import GaussianDiffusion, WrappedModel
from admfast.diffusion import Schedule

__all__ = ["SpacedDiffusion", "space_timesteps"]


def space_timesteps(num_timesteps: int, section_counts: str | Iterable[int]) -> set[int]:
    """Return the timesteps that a respacing keeps: "ddim25", "10,10,10", or counts per section.

    Where no integer stride gives N timesteps, "ddimN" is spaced as evenly as possible, while the published
    function raises; see `admfast.diffusion.space_timesteps`. Raises: InvalidArgument, which is a ValueError.
    """
    if isinstance(section_counts, str):
        return set(diffusion.space_timesteps(num_timesteps, section_counts))
    return set(diffusion.space_timesteps(num_timesteps, section_counts, published=True))


class SpacedDiffusion(GaussianDiffusion):
    """A process that keeps some steps of a longer one; the network gets the longer one's timesteps.

    use_timesteps: the steps to keep. kwargs: see `GaussianDiffusion`.

    Attributes: use_timesteps (a set), timestep_map (a list), original_num_steps, and those of
    `GaussianDiffusion`.
    """

    def __init__(self, use_timesteps: Iterable[int], **kwargs: Any) -> None:
        self.use_timesteps = set(use_timesteps)
        super().__init__(**kwargs)

    def _respaced(self, schedule: Schedule) -> Schedule:
        steps = sorted(step for step in self.use_timesteps if step < schedule.num_timesteps)
        self.original_num_steps, self.timestep_map = schedule.num_timesteps, steps
        return schedule.respaced(steps)

    # As in the base class, but the model or function gets the original timesteps.

    def p_mean_variance(self, model: Callable[..., Tensor], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return super().p_mean_variance(self._wrap_model(model), *args, **kwargs)

    def training_losses(self, model: Callable[..., Tensor], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return super().training_losses(self._wrap_model(model), *args, **kwargs)

    def condition_mean(self, cond_fn: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        return super().condition_mean(self._wrap_model(cond_fn), *args, **kwargs)

    def condition_score(self, cond_fn: Callable[..., Tensor], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return super().condition_score(self._wrap_model(cond_fn), *args, **kwargs)

    def _wrap_model(self, model: Callable[..., Tensor]) -> WrappedModel:
        return model if isinstance(model, WrappedModel) else WrappedModel(model, self._process)

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        return t  # the wrapped model maps them


record_methods(SpacedDiffusion)
_WrappedModel = WrappedModel
