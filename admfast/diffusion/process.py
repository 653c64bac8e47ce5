"""The Gaussian diffusion process: marginals, posterior, and p(x_{t-1} | x_t) from a network's output."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from admfast.diffusion.coefficients import Coefficients, CoefficientTables
from admfast.diffusion.parameterisation import LossType, MeanType, VarType, enum_member
from admfast.diffusion.schedule import Schedule
from admfast.errors import invalid


@dataclass(frozen=True)
class GaussianMoments:
    """Mean, variance and log-variance of a Gaussian, in x's shape; the variances may be expanded views."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor


@dataclass(frozen=True)
class PMeanVariance(GaussianMoments):
    """The moments of p(x_{t-1} | x_t), and the x_0 that the network predicts; all in x_t's shape."""

    pred_xstart: Tensor


class GaussianDiffusion:
    """A diffusion process with a network's parameterisation: maths on tensors, without calling a network.

    Source: `GaussianDiffusion` of the published code.

    Steps are indices t = 0..S-1 of `schedule`; the network sees `model_t(t)`. Methods compute in float64 if
    one of their image tensors is float64, else in float32, with coefficients rounded once from float64. The
    coefficients are uploaded once per device and dtype, and indexed there by t, so that a step moves no data
    between host and device.

    schedule: see `make_schedule`. mean_type, var_type, loss_type: members, or their names.
    Raises: InvalidArgument.
    """

    def __init__(
        self,
        schedule: Schedule,
        mean_type: MeanType | str = MeanType.EPSILON,
        var_type: VarType | str = VarType.LEARNED_RANGE,
        loss_type: LossType | str = LossType.MSE,
    ) -> None:
        self.schedule = schedule
        self.mean_type = enum_member(MeanType, mean_type, "mean_type")
        self.var_type = enum_member(VarType, var_type, "var_type")
        self.loss_type = enum_member(LossType, loss_type, "loss_type")
        self._tables = CoefficientTables(schedule)

    @property
    def num_timesteps(self) -> int:
        """Number of steps, S."""
        return self.schedule.num_timesteps

    def first_steps(self, count: int) -> GaussianDiffusion:
        """Return the process of only the first `count` steps, 0..count-1."""
        if count == self.num_timesteps:
            return self
        schedule = self.schedule.respaced(np.arange(count))
        return GaussianDiffusion(schedule, self.mean_type, self.var_type, self.loss_type)

    def x0_coefficients(self, i: int) -> tuple[float, float]:
        """Return (k_x, k_out) with x_0 = k_x x_t + k_out out at step i; out is the output's mean channels."""
        schedule = self.schedule
        if self.mean_type is MeanType.EPSILON:
            recipm1 = float(schedule.sqrt_recipm1_alphas_cumprod[i])
            return float(schedule.sqrt_recip_alphas_cumprod[i]), -recipm1
        if self.mean_type is MeanType.START_X:
            return 0.0, 1.0
        coef1, coef2 = float(schedule.posterior_mean_coef1[i]), float(schedule.posterior_mean_coef2[i])
        return -coef2 / coef1, 1.0 / coef1

    def log_variance_coefficients(self, i: int) -> tuple[float, float]:
        """Return (l0, l1) with log sigma^2 = l0 + l1 v at step i; v is the output's variance channels."""
        schedule = self.schedule
        low, high = float(schedule.posterior_log_variance_clipped[i]), math.log(schedule.betas[i])
        if self.var_type is VarType.LEARNED:
            return 0.0, 1.0
        if self.var_type is VarType.LEARNED_RANGE:
            return (low + high) / 2, (high - low) / 2
        if self.var_type is VarType.FIXED_SMALL:
            with np.errstate(divide="ignore"):
                return float(np.log(schedule.posterior_variance[i])), 0.0
        first_variance = schedule.posterior_variance[1] if schedule.num_timesteps > 1 else schedule.betas[0]
        return math.log(first_variance if i == 0 else schedule.betas[i]), 0.0

    def model_t(self, t: Tensor) -> Tensor:
        """Return the timesteps that the network and a classifier see: [N] int64, or float32 if not whole.

        t: [N], indices 0..S-1. Raises: InvalidArgument. Not differentiable.
        """
        return self._tables.model_t(t)

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> GaussianMoments:
        """Return q(x_t | x_0) = N(sqrt(alpha_bar) x_0, 1 - alpha_bar).

        Source: Ho et al. 2020, eq. 4.

        x_start: [N, ...]. t: [N], indices. Differentiable in x_start. Raises: InvalidArgument.
        """
        at = self._tables.at(t, x_start)
        mean = at("sqrt_alphas_cumprod") * x_start
        return GaussianMoments(
            mean, at.full("one_minus_alphas_cumprod"), at.full("log_one_minus_alphas_cumprod")
        )

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise.

        Source: Ho et al. 2020, eq. 4.

        x_start, noise: [N, ...]. t: [N], indices. Differentiable in x_start and noise.
        Raises: InvalidArgument.
        """
        _check_shape("noise", noise, x_start)
        at = self._tables.at(t, x_start, noise)
        return at("sqrt_alphas_cumprod") * x_start + at("sqrt_one_minus_alphas_cumprod") * noise

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> GaussianMoments:
        """Return q(x_{t-1} | x_t, x_0); at t = 0 the variance is 0, and log_variance is that of t = 1.

        mean = sqrt(alpha_bar_prev) beta / (1 - alpha_bar) x_0
             + sqrt(alpha) (1 - alpha_bar_prev) / (1 - alpha_bar) x_t,
        variance = beta (1 - alpha_bar_prev) / (1 - alpha_bar).
        Source: Ho et al. 2020, eq. 6 and 7.

        x_start, x_t: [N, ...]. t: [N], indices. Differentiable in x_start and x_t. Raises: InvalidArgument.
        """
        _check_shape("x_t", x_t, x_start)
        at = self._tables.at(t, x_start, x_t)
        mean = at("posterior_mean_coef1") * x_start + at("posterior_mean_coef2") * x_t
        return GaussianMoments(mean, at.full("posterior_variance"), at.full("posterior_log_variance_clipped"))

    def p_mean_variance(
        self,
        model_output: Tensor,
        x_t: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
    ) -> PMeanVariance:
        """Return p(x_{t-1} | x_t) from the network's output at (x_t, model_t(t)).

        x_0 is computed from the mean channels, passed through denoised_fn, then clipped to [-1, 1] if
        clip_denoised; the mean is that of q(x_{t-1} | x_t, x_0). PREVIOUS_X keeps the network's own mean:
        only the returned x_0 is clipped. LEARNED_RANGE: log sigma^2 = f log beta + (1 - f) log posterior
        variance, f = (v + 1) / 2, not clipped (Nichol & Dhariwal 2021, eq. 15).
        Source: `p_mean_variance` of the published code.

        model_output: [N, C, ...], or [N, 2C, ...] if the variance is learned. x_t: [N, C, ...].
        t: [N], indices. denoised_fn: maps x_0 to an x_0 of the same shape. Returns tensors of x_t's shape.
        Differentiable in model_output and x_t; clipping passes no gradient outside [-1, 1].
        Raises: InvalidArgument.
        """
        at = self._tables.at(t, x_t, model_output)
        out, v = self.split_output(model_output.to(at.dtype), x_t)
        variance, log_variance = self._variance(at, v)
        if self.mean_type is MeanType.EPSILON:
            x_start = self.predict_xstart_from_eps(x_t, t, out)
        elif self.mean_type is MeanType.START_X:
            x_start = out
        else:
            x_start = self.predict_xstart_from_xprev(x_t, t, out)
        if denoised_fn is not None:
            x_start = denoised_fn(x_start)
            _check_shape("denoised_fn(x_0)", x_start, x_t)
        if clip_denoised:
            x_start = x_start.clamp(-1, 1)
        mean = out if self.mean_type is MeanType.PREVIOUS_X else self.q_posterior(x_start, x_t, t).mean
        return PMeanVariance(mean, variance, log_variance, x_start)

    def split_output(self, model_output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return (mean channels, variance channels or None) of a network's output, as views of x_t's shape.

        model_output: [N, C, ...], or [N, 2C, ...] if the variance is learned. Differentiable.
        Raises: InvalidArgument for another shape.
        """
        channels = x_t.shape[1]
        expected = (x_t.shape[0], channels * (2 if self.var_type.learned else 1), *x_t.shape[2:])
        if model_output.shape != expected:
            allowed = f"{expected}, with {self.var_type.name} variance and this x_t"
            raise invalid("model_output.shape", tuple(model_output.shape), allowed)
        if not self.var_type.learned:
            return model_output, None
        return model_output[:, :channels], model_output[:, channels:]

    def _variance(self, at: Coefficients, v: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return (variance, log_variance) of p(x_{t-1} | x_t) in x_t's shape; v is the variance channels."""
        if v is None:
            if self.var_type is VarType.FIXED_LARGE:
                return at.full("fixed_large_variance"), at.full("fixed_large_log_variance")
            return at.full("posterior_variance"), at.full("posterior_log_variance_clipped")
        if self.var_type is VarType.LEARNED:
            return v.exp(), v
        fraction = (v + 1) / 2
        log_variance = fraction * at("log_betas") + (1 - fraction) * at("posterior_log_variance_clipped")
        return log_variance.exp(), log_variance

    def predict_xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Return x_0 = x_t / sqrt(alpha_bar) - sqrt(1 / alpha_bar - 1) eps.

        x_t, eps: [N, ...]. t: [N], indices. Differentiable in x_t and eps. Raises: InvalidArgument.
        """
        _check_shape("eps", eps, x_t)
        at = self._tables.at(t, x_t, eps)
        return at("sqrt_recip_alphas_cumprod") * x_t - at("sqrt_recipm1_alphas_cumprod") * eps

    def predict_xstart_from_xprev(self, x_t: Tensor, t: Tensor, x_prev: Tensor) -> Tensor:
        """Return the x_0 whose posterior mean is x_prev: (x_prev - coef2 x_t) / coef1.

        x_t, x_prev: [N, ...]. t: [N], indices. Differentiable in x_t and x_prev. Raises: InvalidArgument.
        """
        _check_shape("x_prev", x_prev, x_t)
        at = self._tables.at(t, x_t, x_prev)
        return at("recip_posterior_mean_coef1") * x_prev - at("posterior_mean_coef2_over_coef1") * x_t

    def predict_eps_from_xstart(self, x_t: Tensor, t: Tensor, x_start: Tensor) -> Tensor:
        """Return eps = (x_t / sqrt(alpha_bar) - x_0) / sqrt(1 / alpha_bar - 1).

        x_t, x_start: [N, ...]. t: [N], indices. Differentiable in x_t and x_start. Raises: InvalidArgument.
        """
        _check_shape("x_start", x_start, x_t)
        at = self._tables.at(t, x_t, x_start)
        return (at("sqrt_recip_alphas_cumprod") * x_t - x_start) / at("sqrt_recipm1_alphas_cumprod")

    def condition_mean(self, p: PMeanVariance, gradient: Tensor) -> Tensor:
        """Return the guided mean of x_{t-1}, mean + variance * gradient; the x_0 of p stays as it is.

        Source: Dhariwal & Nichol 2021, algorithm 1; `condition_mean` of the published code.

        gradient: scale * grad of log p(y | x) at x_t, of p.mean's shape. Differentiable in p's tensors and
        gradient.
        Raises: InvalidArgument.
        """
        _check_shape("gradient", gradient, p.mean)
        return p.mean + p.variance * gradient.to(p.mean.dtype)

    def condition_score(self, p: PMeanVariance, gradient: Tensor, x_t: Tensor, t: Tensor) -> PMeanVariance:
        """Return p(x_{t-1} | x_t) with the guided noise eps - sqrt(1 - alpha_bar) * gradient.

        x_0 and the mean follow from that eps and are not clipped again; the variance stays.
        Source: Dhariwal & Nichol 2021, algorithm 2; `condition_score` of the published code.

        gradient: scale * grad of log p(y | x) at x_t, [N, ...]. x_t: [N, ...]. t: [N], indices.
        Differentiable in p's tensors, gradient and x_t. Raises: InvalidArgument.
        """
        _check_shape("gradient", gradient, x_t)
        at = self._tables.at(t, x_t, p.pred_xstart)
        eps = self.predict_eps_from_xstart(x_t, t, p.pred_xstart)
        eps = eps - at("sqrt_one_minus_alphas_cumprod") * gradient.to(at.dtype)
        x_start = self.predict_xstart_from_eps(x_t, t, eps)
        return replace(p, mean=self.q_posterior(x_start, x_t, t).mean, pred_xstart=x_start)


def _check_shape(name: str, value: Tensor, like: Tensor) -> None:
    if value.shape != like.shape:
        raise invalid(f"{name}.shape", tuple(value.shape), f"the shape of x, {tuple(like.shape)}")
