"""The four training objectives of the published code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from admfast.diffusion.gaussian import mean_flat
from admfast.diffusion.likelihood import Model, vb_terms_bpd
from admfast.diffusion.parameterisation import LossType, MeanType
from admfast.diffusion.process import GaussianDiffusion


def training_losses(
    process: GaussianDiffusion,
    model: Model,
    x_start: Tensor,
    t: Tensor,
    noise: Tensor | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Return the loss of each sample at its own step t, and its parts.

    The network is called once, at x_t = q_sample(x_0, t, noise). The loss depends on `process.loss_type`:
    MSE: mse + vb; RESCALED_MSE: mse + vb * S / 1000; KL: vb; RESCALED_KL: vb * S.
    mse is the mean squared error, over pixels, of the network's prediction (noise, x_0 or posterior mean).
    vb is the term of the variational bound in bits per dimension, without clipping. In the MSE losses it
    exists only if the variance is learned, and trains only the variance (the mean is detached).
    Source: Ho et al. 2020, eq. 14; Nichol & Dhariwal 2021, eq. 16; `training_losses` of the published code.

    model: called as model(x_t, process.model_t(t), **model_kwargs); returns [N, C, ...] or [N, 2C, ...].
    x_start: [N, C, ...], 8-bit levels scaled to [-1, 1]. t: [N], indices.
    noise: of x_start's shape; None draws it from torch's generator.

    Returns "loss" and, for the MSE losses, "mse" and (if the variance is learned) "vb" as it enters the loss:
    [N] each, without the weights of the sampler of t. Differentiable in the network's parameters, x_start and
    noise.
    Raises: InvalidArgument.
    """
    if noise is None:
        noise = torch.randn_like(x_start)
    steps = process.num_timesteps
    x_t = process.q_sample(x_start, t, noise)
    output = model(x_t, process.model_t(t), **dict(model_kwargs or {}))
    if process.loss_type.is_vb():
        vb = vb_terms_bpd(process, output, x_start, x_t, t, clip_denoised=False).output
        return {"loss": vb * steps if process.loss_type is LossType.RESCALED_KL else vb}

    mean_part, variance_part = process.split_output(output, x_t)
    terms = {"mse": mean_flat((_target(process, x_start, x_t, t, noise) - mean_part) ** 2)}
    terms["loss"] = terms["mse"]
    if variance_part is not None:
        detached_output = torch.cat([mean_part.detach(), variance_part], dim=1)
        vb = vb_terms_bpd(process, detached_output, x_start, x_t, t, clip_denoised=False).output
        if process.loss_type is LossType.RESCALED_MSE:
            # S times one random term estimates the whole bound; without the 1/1000 it would outweigh the mse.
            vb = vb * (steps / 1000.0)
        terms["vb"] = vb
        terms["loss"] = terms["mse"] + vb
    return terms


def _target(process: GaussianDiffusion, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Return the target of the mean channels."""
    if process.mean_type is MeanType.EPSILON:
        return noise
    if process.mean_type is MeanType.START_X:
        return x_start
    return process.q_posterior(x_start, x_t, t).mean
