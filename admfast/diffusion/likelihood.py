"""The variational bound on log p(x_0), term by term, in bits per dimension."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from admfast.diffusion.gaussian import discretized_gaussian_log_likelihood, mean_flat, normal_kl
from admfast.diffusion.process import GaussianDiffusion
from admfast.errors import invalid

Model = Callable[..., Tensor]


@dataclass(frozen=True)
class VbTerms:
    """One term of the bound: `output` [N], in bits per dimension. `pred_xstart`: x_0 [N, C, ...]."""

    output: Tensor
    pred_xstart: Tensor


@dataclass(frozen=True)
class BitsPerDimension:
    """The bound and its parts: [N], or [N, S] with column 0 for t = S-1 and the last column for t = 0.

    total_bpd = prior_bpd + sum of vb over the columns, bits per dimension. xstart_mse: mean squared error of
    the network's x_0. mse: mean squared error of the noise that its x_0 implies.
    """

    total_bpd: Tensor
    prior_bpd: Tensor
    vb: Tensor
    xstart_mse: Tensor
    mse: Tensor


def vb_terms_bpd(
    process: GaussianDiffusion,
    model_output: Tensor,
    x_start: Tensor,
    x_t: Tensor,
    t: Tensor,
    clip_denoised: bool = True,
) -> VbTerms:
    """Return one term of the variational bound per sample, in bits per dimension.

    t > 0: KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)); t = 0: -log p(x_0 | x_1) of 8-bit levels.
    Source: Ho et al. 2020, eq. 5 and 13; `_vb_terms_bpd` of the published code.

    model_output: the output at (x_t, process.model_t(t)), see `GaussianDiffusion.p_mean_variance`.
    x_start: [N, C, ...], 8-bit levels scaled to [-1, 1]. x_t: [N, C, ...]. t: [N], indices.
    Differentiable in model_output, x_start and x_t. Raises: InvalidArgument.
    """
    true = process.q_posterior(x_start, x_t, t)
    p = process.p_mean_variance(model_output, x_t, t, clip_denoised=clip_denoised)
    kl = mean_flat(normal_kl(true.mean, true.log_variance, p.mean, p.log_variance))
    decoder = discretized_gaussian_log_likelihood(x_start, means=p.mean, log_scales=0.5 * p.log_variance)
    nats = torch.where(t == 0, -mean_flat(decoder), kl)
    return VbTerms(nats / math.log(2.0), p.pred_xstart)


def prior_bpd(process: GaussianDiffusion, x_start: Tensor) -> Tensor:
    """Return KL(q(x_T | x_0) || N(0, 1)) per sample, [N], in bits per dimension; no network is involved.

    Source: Ho et al. 2020, eq. 5; `_prior_bpd` of the published code.

    x_start: [N, ...] in [-1, 1]. Differentiable in x_start.
    """
    last = torch.full((x_start.shape[0],), process.num_timesteps - 1, device=x_start.device)
    q = process.q_mean_variance(x_start, last)
    return mean_flat(normal_kl(q.mean, q.log_variance, 0.0, 0.0)) / math.log(2.0)


def bits_per_dimension(
    process: GaussianDiffusion,
    model: Model,
    x_start: Tensor,
    clip_denoised: bool = True,
    model_kwargs: Mapping[str, Any] | None = None,
    *,
    noises: Iterable[Tensor] | None = None,
    generator: torch.Generator | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> BitsPerDimension:
    """Return the variational bound on -log2 p(x_0) per dimension, with one draw of x_t at each step.

    It calls the model S times, without gradients. Source: `calc_bpd_loop` of the published code.

    model: called as model(x_t, process.model_t(t), **model_kwargs). Its mode is kept: call eval() first.
    x_start: [N, C, ...], 8-bit levels scaled to [-1, 1].
    noises: S tensors of x_start's shape (or one [S, N, C, ...]), t = S-1 first; None draws them.
    generator: source of drawn noise, on x_start's device; None is torch's default generator.
    progress: called with (steps done, S) after each step.
    Raises: InvalidArgument. Not differentiable.
    """
    kwargs = dict(model_kwargs or {})
    steps = process.num_timesteps
    noise_per_step = _iterate_noise(x_start, steps, noises, generator)
    vb, xstart_mse, mse = [], [], []
    with torch.no_grad():
        for num_done, step in enumerate(range(steps - 1, -1, -1), start=1):
            t = torch.full((x_start.shape[0],), step, device=x_start.device)
            noise = next(noise_per_step, None)
            if noise is None:
                raise invalid("noises", f"{num_done - 1} tensors", f"{steps}, one per step")
            x_t = process.q_sample(x_start, t, noise)
            output = model(x_t, process.model_t(t), **kwargs)
            terms = vb_terms_bpd(process, output, x_start, x_t, t, clip_denoised)
            eps = process.predict_eps_from_xstart(x_t, t, terms.pred_xstart)
            vb.append(terms.output)
            xstart_mse.append(mean_flat((terms.pred_xstart - x_start) ** 2))
            mse.append(mean_flat((eps - noise) ** 2))
            if progress is not None:
                progress(num_done, steps)
        prior = prior_bpd(process, x_start)
    terms_vb = torch.stack(vb, dim=1)  # [N, S]
    total = terms_vb.sum(dim=1) + prior
    return BitsPerDimension(total, prior, terms_vb, torch.stack(xstart_mse, dim=1), torch.stack(mse, dim=1))


def _iterate_noise(
    x_start: Tensor, steps: int, noises: Iterable[Tensor] | None, generator: torch.Generator | None
) -> Iterator[Tensor]:
    """Return an iterator over the noise of each step, t = S-1 first."""
    if noises is None:
        shape, device, dtype = x_start.shape, x_start.device, x_start.dtype
        return (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(steps))
    if isinstance(noises, Sized) and len(noises) != steps:
        raise invalid("noises", f"{len(noises)} tensors", f"{steps}, one per step")
    return iter(noises)
