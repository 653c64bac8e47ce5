"""The diffusion process under the names of the published `gaussian_diffusion.py`.

The formulas are those of `admfast.diffusion`. Loops draw from torch's generator in the published order:
x_T first, then noise at every step, including the last.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from admfast.compat.guided_diffusion.change_guard import Array, ChangeGuard, record_methods
from admfast.compat.guided_diffusion.losses import discretized_gaussian_log_likelihood, normal_kl
from admfast.compat.guided_diffusion.prepared_loops import prepared_loop, with_progress
from admfast.diffusion import GaussianDiffusion as Process
from admfast.diffusion import (
    LossType,
    PMeanVariance,
    Schedule,
    beta_schedule,
    bits_per_dimension,
    prior_bpd,
    training_losses,
    vb_terms_bpd,
)
from admfast.diffusion import MeanType as ModelMeanType
from admfast.diffusion import VarType as ModelVarType
from admfast.diffusion.gaussian import mean_flat

__all__ = [
    "GaussianDiffusion",
    "LossType",
    "ModelMeanType",
    "ModelVarType",
    "discretized_gaussian_log_likelihood",
    "get_named_beta_schedule",
    "mean_flat",
    "normal_kl",
]

Model = Callable[..., Tensor]
Kwargs = Mapping[str, Any] | None


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> Array:
    """Return the betas of "linear" or "cosine", float64 [S]. Raises: InvalidArgument."""
    return beta_schedule(schedule_name, num_diffusion_timesteps)


class GaussianDiffusion(ChangeGuard):
    """A diffusion process, its losses and its sampling loops.

    betas: [S], in (0, 1]. model_mean_type, model_var_type, loss_type: members of the enumerations.
    rescale_timesteps: the network gets float timesteps in 0..1000.

    Attributes: num_timesteps, the arguments, and the float64 arrays [S] of `Schedule` by their published
    names (betas, alphas_cumprod, posterior_variance, ...). None of them may be changed, because admfast's
    formulas would ignore the change. A subclass may override whole steps and loops, but not a formula within
    one, such as `q_sample` within `training_losses`, because it would not be called.
    Raises: InvalidArgument; NotImplementedError if something was changed or overridden that would be ignored.
    """

    def __init__(
        self,
        *,
        betas: npt.ArrayLike,
        model_mean_type: ModelMeanType,
        model_var_type: ModelVarType,
        loss_type: LossType,
        rescale_timesteps: bool = False,
    ) -> None:
        self.model_mean_type, self.model_var_type = model_mean_type, model_var_type
        self.loss_type, self.rescale_timesteps = loss_type, rescale_timesteps
        self._schedule = self._respaced(Schedule.from_betas(betas, rescale_timesteps=rescale_timesteps))
        self.num_timesteps = self._schedule.num_timesteps
        self._guard(Process(self._schedule, model_mean_type, model_var_type, loss_type))

    def _respaced(self, schedule: Schedule) -> Schedule:
        return schedule

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        return self._process.model_t(t)

    # Marginals and posteriors

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean, variance and log variance of q(x_t | x_0), of x_start's shape."""
        q = self._process.q_mean_variance(x_start, t)
        return q.mean, q.variance, q.log_variance

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise; draw the noise if it is None."""
        return self._process.q_sample(x_start, t, torch.randn_like(x_start) if noise is None else noise)

    def q_posterior_mean_variance(
        self, x_start: Tensor, x_t: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean, variance and clipped log variance of q(x_{t-1} | x_t, x_0)."""
        q = self._process.q_posterior(x_start, x_t, t)
        return q.mean, q.variance, q.log_variance

    def p_mean_variance(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: Kwargs = None,
    ) -> dict[str, Tensor]:
        """Return {"mean", "variance", "log_variance", "pred_xstart"} of p(x_{t-1} | x_t), in x's shape."""
        out = model(x, self._scale_timesteps(t), **(model_kwargs or {}))
        process = self._formulas(
            "_predict_xstart_from_eps", "_predict_xstart_from_xprev", "q_posterior_mean_variance"
        )
        return dict(vars(process.p_mean_variance(out, x, t, clip_denoised, denoised_fn)))

    def _predict_xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        return self._process.predict_xstart_from_eps(x_t, t, eps)

    def _predict_xstart_from_xprev(self, x_t: Tensor, t: Tensor, xprev: Tensor) -> Tensor:
        return self._process.predict_xstart_from_xprev(x_t, t, xprev)

    def _predict_eps_from_xstart(self, x_t: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        return self._process.predict_eps_from_xstart(x_t, t, pred_xstart)

    def condition_mean(
        self,
        cond_fn: Model,
        p_mean_var: Mapping[str, Tensor],
        x: Tensor,
        t: Tensor,
        model_kwargs: Kwargs = None,
    ) -> Tensor:
        """Return the guided mean, mean + variance * cond_fn(x, t, **model_kwargs)."""
        gradient = cond_fn(x, self._scale_timesteps(t), **(model_kwargs or {}))
        return self._process.condition_mean(PMeanVariance(**p_mean_var), gradient)

    def condition_score(
        self,
        cond_fn: Model,
        p_mean_var: Mapping[str, Tensor],
        x: Tensor,
        t: Tensor,
        model_kwargs: Kwargs = None,
    ) -> dict[str, Tensor]:
        """Return p_mean_var recomputed for the noise eps - sqrt(1 - alpha_bar) * cond_fn(x, t, **kwargs)."""
        gradient = cond_fn(x, self._scale_timesteps(t), **(model_kwargs or {}))
        process = self._formulas(
            "_predict_eps_from_xstart", "_predict_xstart_from_eps", "q_posterior_mean_variance"
        )
        p = process.condition_score(PMeanVariance(**p_mean_var), gradient, x, t)
        return dict(vars(p))

    # Steps

    def p_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Model | None = None,
        model_kwargs: Kwargs = None,
    ) -> dict[str, Tensor]:
        """Return {"sample": x_{t-1} drawn from p(x_{t-1} | x_t), "pred_xstart": x_0}."""
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        noise = torch.randn_like(x)
        if cond_fn is not None:
            out["mean"] = self.condition_mean(cond_fn, out, x, t, model_kwargs=model_kwargs)
        spread = _nonzero_mask(t, x) * torch.exp(0.5 * out["log_variance"])
        return {"sample": out["mean"] + spread * noise, "pred_xstart": out["pred_xstart"]}

    def ddim_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Model | None = None,
        model_kwargs: Kwargs = None,
        eta: float = 0.0,
    ) -> dict[str, Tensor]:
        """Return {"sample": x_{t-1} of DDIM (Song et al. 2020, eq. 12), "pred_xstart": x_0}."""
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        if cond_fn is not None:
            out = self.condition_score(cond_fn, out, x, t, model_kwargs=model_kwargs)
        eps = self._predict_eps_from_xstart(x, t, out["pred_xstart"])
        bar, bar_prev = (
            _extract_into_tensor(values, t, x.shape)
            for values in (self._schedule.alphas_cumprod, self._schedule.alphas_cumprod_prev)
        )
        sigma = eta * torch.sqrt((1 - bar_prev) / (1 - bar)) * torch.sqrt(1 - bar / bar_prev)
        noise = torch.randn_like(x)
        mean = out["pred_xstart"] * torch.sqrt(bar_prev) + torch.sqrt(1 - bar_prev - sigma**2) * eps
        return {"sample": mean + _nonzero_mask(t, x) * sigma * noise, "pred_xstart": out["pred_xstart"]}

    def ddim_reverse_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: Kwargs = None,
        eta: float = 0.0,
    ) -> dict[str, Tensor]:
        """Return {"sample": x_{t+1} of deterministic DDIM in reverse, "pred_xstart": x_0}; eta must be 0."""
        assert eta == 0.0, "Reverse ODE only for deterministic path"
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        eps = self._predict_eps_from_xstart(x, t, out["pred_xstart"])
        bar_next = _extract_into_tensor(self._schedule.alphas_cumprod_next, t, x.shape)
        sample = out["pred_xstart"] * torch.sqrt(bar_next) + torch.sqrt(1 - bar_next) * eps
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    # Loops

    def p_sample_loop(self, model: Model, shape: Sequence[int], *args: Any, **kwargs: Any) -> Tensor:
        """Return samples [N, C, *spatial] of ancestral sampling; arguments as `p_sample_loop_progressive`.

        The loop runs as one prepared step unless it calls other code of the caller than the published; see
        `prepared_loops.prepared_loop`.
        """
        return self._loop("p_sample", model, shape, *args, **kwargs)

    def ddim_sample_loop(self, model: Model, shape: Sequence[int], *args: Any, **kwargs: Any) -> Tensor:
        """Return samples of DDIM; arguments as `ddim_sample_loop_progressive`. See `p_sample_loop`."""
        return self._loop("ddim_sample", model, shape, *args, **kwargs)

    def _loop(self, step: str, model: Model, shape: Sequence[int], *args: Any, **kwargs: Any) -> Tensor:
        samples = prepared_loop(self, step, model, shape, *args, **kwargs)
        if samples is not None:
            return samples
        steps = getattr(self, f"{step}_loop_progressive")(model, shape, *args, **kwargs)
        (last,) = deque(steps, maxlen=1)
        return last["sample"]

    def p_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Model | None = None,
        model_kwargs: Kwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
    ) -> Iterator[dict[str, Tensor]]:
        """Yield the result of `p_sample` at every step, t = S-1 to 0, without gradients.

        model: called as model(x, t, **model_kwargs) with t [N] of the original process. shape: that of the
        samples. noise: x_T, drawn if None. denoised_fn: applied to x_0 before it is clipped. cond_fn:
        cond_fn(x, t, **model_kwargs) returns the gradient of the guidance. device: that of the model's
        parameters if None. progress: show a progress bar.
        """
        step = partial(
            self.p_sample, clip_denoised=clip_denoised, denoised_fn=denoised_fn, cond_fn=cond_fn,
            model_kwargs=model_kwargs,
        )  # fmt: skip
        return self._steps(step, model, shape, noise, device, progress)

    def ddim_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Model | None = None,
        model_kwargs: Kwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> Iterator[dict[str, Tensor]]:
        """Yield the result of `ddim_sample` at every step; arguments as `p_sample_loop_progressive`."""
        step = partial(
            self.ddim_sample, clip_denoised=clip_denoised, denoised_fn=denoised_fn, cond_fn=cond_fn,
            model_kwargs=model_kwargs, eta=eta,
        )  # fmt: skip
        return self._steps(step, model, shape, noise, device, progress)

    def _steps(
        self,
        step: Callable[..., dict[str, Tensor]],
        model: Any,
        shape: Sequence[int],
        noise: Tensor | None,
        device: torch.device | str | None,
        progress: bool,
    ) -> Iterator[dict[str, Tensor]]:
        device = next(model.parameters()).device if device is None else device
        assert isinstance(shape, tuple | list)
        x = torch.randn(*shape, device=device) if noise is None else noise
        for i in with_progress(reversed(range(self.num_timesteps)), self.num_timesteps, progress):
            with torch.no_grad():
                out = step(model, x, torch.tensor([i] * shape[0], device=device))
            yield out
            x = out["sample"]

    # Losses

    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: Kwargs = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the loss of each sample, [N], and its parts; see `admfast.diffusion.training_losses`."""
        process = self._formulas("q_sample", "_vb_terms_bpd", *_METHODS_OF_VB_TERMS)
        return training_losses(process, _unwrapped(model), x_start, t, noise, model_kwargs)

    def calc_bpd_loop(
        self, model: Model, x_start: Tensor, clip_denoised: bool = True, model_kwargs: Kwargs = None
    ) -> dict[str, Tensor]:
        """Return {"total_bpd", "prior_bpd"}, each [N], and {"vb", "xstart_mse", "mse"}, each [N, S].

        vb and both bpd are in bits per dimension. The S columns are in the order t = S-1 to 0.
        """
        process = self._formulas(
            "q_sample", "_vb_terms_bpd", "_prior_bpd", "_predict_eps_from_xstart", *_METHODS_OF_VB_TERMS
        )
        bits = bits_per_dimension(process, _unwrapped(model), x_start, clip_denoised, model_kwargs)
        return dict(vars(bits))

    def _vb_terms_bpd(
        self,
        model: Model,
        x_start: Tensor,
        x_t: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        model_kwargs: Kwargs = None,
    ) -> dict[str, Tensor]:
        process = self._formulas(*_METHODS_OF_VB_TERMS)
        out = _unwrapped(model)(x_t, process.model_t(t), **(model_kwargs or {}))
        return dict(vars(vb_terms_bpd(process, out, x_start, x_t, t, clip_denoised)))

    def _prior_bpd(self, x_start: Tensor) -> Tensor:
        return prior_bpd(self._formulas("q_mean_variance"), x_start)


# Methods that the published variational terms call.
_METHODS_OF_VB_TERMS = ("p_mean_variance", "q_posterior_mean_variance", "_scale_timesteps")
record_methods(GaussianDiffusion)


class WrappedModel:
    """A model that is called with steps of a respaced process and gets timesteps of the original one."""

    def __init__(self, model: Model, process: Process) -> None:
        self.model, self.process = model, process

    def __call__(self, x: Tensor, ts: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.model(x, self.process.model_t(ts), *args, **kwargs)


def _unwrapped(model: Model) -> Model:
    """Return the model without its wrapper, for formulas that map the timesteps themselves."""
    return model.model if isinstance(model, WrappedModel) else model


def _nonzero_mask(t: Tensor, x: Tensor) -> Tensor:
    """Return 0 for images at t = 0 and 1 for all others, shaped [N, 1, ...]."""
    return (t != 0).to(x.dtype).view(-1, *[1] * (x.dim() - 1))


def _extract_into_tensor(arr: npt.ArrayLike, timesteps: Tensor, broadcast_shape: Sequence[int]) -> Tensor:
    """Return arr[timesteps] as float32 of a shape [N, ...]."""
    values = torch.tensor(np.asarray(arr), device=timesteps.device)[timesteps].float()
    return values.view(-1, *[1] * (len(broadcast_shape) - 1)).expand(broadcast_shape)
