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
    diffusion: GaussianDiffusion,
    model: Model,
    x_start: Tensor,
    t: Tensor,
    noise: Tensor | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Return the loss of each sample at its own step t, and its parts.

    x_t = q_sample(x_0, t, noise), one call of the network, then by `diffusion.loss_type`:
    MSE: mse + vb; RESCALED_MSE: mse + vb * S / 1000; KL: vb; RESCALED_KL: vb * S.
    mse is the mean over the pixels of the squared error of noise, x_0 or posterior mean, whichever the
    network predicts. vb is the term of the variational bound in bits per dimension, without clipping; beside
    mse it exists only where the variance is learned, and teaches the variance alone (the mean is detached).
    Source: DDPM eq. 14; Nichol and Dhariwal 2021, eq. 16; `training_losses` of the published code.

    model: called as model(x_t, diffusion.model_t(t), **model_kwargs), gives [N, C, ...] or [N, 2C, ...].
    x_start: [N, C, ...], 8-bit levels scaled to [-1, 1]. t: [N], indices.
    noise: of x_start's shape; None draws it from torch's generator.

    Returns "loss" and, for the MSE losses, "mse" and (variance learned) "vb" as it enters the loss: [N] each,
    not yet weighted by the sampler of t. Differentiable in the network's parameters, x_start and noise.
    Raises: InvalidArgument.
    """
    if noise is None:
        noise = torch.randn_like(x_start)
    steps = diffusion.num_timesteps
    x_t = diffusion.q_sample(x_start, t, noise)
    output = model(x_t, diffusion.model_t(t), **dict(model_kwargs or {}))
    if diffusion.loss_type.is_vb():
        vb = vb_terms_bpd(diffusion, output, x_start, x_t, t, clip_denoised=False).output
        return {"loss": vb * steps if diffusion.loss_type is LossType.RESCALED_KL else vb}

    mean_part, variance_part = diffusion.split_output(output, x_t)
    terms = {"mse": mean_flat((_target(diffusion, x_start, x_t, t, noise) - mean_part) ** 2)}
    terms["loss"] = terms["mse"]
    if variance_part is not None:
        held = torch.cat([mean_part.detach(), variance_part], dim=1)
        vb = vb_terms_bpd(diffusion, held, x_start, x_t, t, clip_denoised=False).output
        if diffusion.loss_type is LossType.RESCALED_MSE:
            # S times one random term estimates the whole bound; without the 1/1000 it would drown the error.
            vb = vb * (steps / 1000.0)
        terms["vb"] = vb
        terms["loss"] = terms["mse"] + vb
    return terms


def _target(diffusion: GaussianDiffusion, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Return what the mean channels should be."""
    if diffusion.mean_type is MeanType.EPSILON:
        return noise
    if diffusion.mean_type is MeanType.START_X:
        return x_start
    return diffusion.q_posterior(x_start, x_t, t).mean
