"""Wrap a pipeline as a denoiser of deepinv or azula, so that their algorithms run on our networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from admfast.errors import Unavailable, allowed_names, first_line, invalid
from admfast.sampling.pipeline import Pipeline


class NoiseLevels:
    """Noise levels of a process, to find the timestep at which signal and noise have a given ratio.

    rounded: return one of the process's integer timesteps. round_up: round to the first timestep with at
    least as much noise; otherwise to the one with the nearest sqrt(1 - alpha_bar).
    """

    def __init__(self, pipe: Pipeline, rounded: bool, round_up: bool):
        schedule = pipe.diffusion.build("").schedule
        log_snr = schedule.log_snr(np.arange(schedule.num_timesteps))
        self._noisiness = torch.from_numpy(-log_snr)  # float64 [S], rising
        self._rounded, self._round_up = rounded, round_up

    def timestep(self, signal: Tensor, noise: Tensor) -> Tensor:
        """Return t [N] for signal and noise scales [N]: int64 if `rounded`, else float64."""
        ratio = (noise.double() / signal.double()).cpu()
        target, noisiness = 2 * ratio.log(), self._noisiness
        if self._rounded and not self._round_up:
            wanted_share = (ratio.square() / (1 + ratio.square())).sqrt()
            noise_shares = torch.sigmoid(noisiness).sqrt()
            return (noise_shares[:, None] - wanted_share[None]).abs().argmin(0).to(signal.device)
        after = torch.searchsorted(noisiness, target).clamp(1, len(noisiness) - 1)
        if self._rounded:
            return torch.where(target <= noisiness[0], 0, after).to(signal.device)
        share = (target - noisiness[after - 1]) / (noisiness[after] - noisiness[after - 1])
        return (after - 1 + share.clamp(0, 1)).to(signal.device)


def denoiser(pipe: Pipeline, library: str, rounded: bool = False) -> Any:
    """Return a denoiser of deepinv or azula that runs a pipeline; their samplers and restorers accept it.

    "deepinv": a `deepinv.models.Denoiser`, `forward(x, sigma, y=None)`; x is in [0, 1], and sigma is the
    standard deviation of its noise.
    "azula": an `azula.denoise.Denoiser`, `forward(x_t, t, label=None)`, with azula's VP schedule; the
    returned variance is sigma^2 / (alpha^2 + sigma^2), which assumes images of variance one.

    Both are differentiable in x and return its dtype. A noise level between two timesteps gives a fractional
    timestep, by linear interpolation of the log-SNR; a level outside the process gives its first or last one.

    Args:
        pipe: the pipeline of a diffusion model (an upsampler needs more than a noisy image).
        library: "deepinv" or "azula".
        rounded: use only integer timesteps of the process, as the libraries' own denoisers do.

    Raises: InvalidArgument; Unavailable if the library can't be imported.
    """
    if not isinstance(pipe, Pipeline) or pipe.low_res_size is not None or pipe.config.kind != "unet":
        raise invalid("pipe", pipe, "a Pipeline of a diffusion model")
    if library not in _MAKERS:
        raise invalid("library", library, allowed_names(library, _MAKERS))
    try:
        return _MAKERS[library](pipe, rounded)
    except ImportError as error:
        raise Unavailable(f"library={library!r}: it can't be imported: {first_line(error)}") from error


def _predict_x0(
    pipe: Pipeline, x_t: Tensor, t: Tensor, signal: Tensor, noise: Tensor, classes: Any
) -> Tensor:
    """Return x_0 = (x_t - noise * eps) / signal for x_t [N, C, H, W]; signal and noise are scales [N]."""
    eps = pipe.predict(x_t.float(), t if t.dtype == torch.int64 else t.float(), classes).eps.to(x_t.dtype)
    return (x_t - noise.to(x_t.dtype)[:, None, None, None] * eps) / signal.to(x_t.dtype)[:, None, None, None]


def _deepinv_denoiser(pipe: Pipeline, rounded: bool) -> nn.Module:
    from deepinv.models import Denoiser

    levels = NoiseLevels(pipe, rounded, round_up=False)

    class PipelineDenoiser(Denoiser):
        """A pipeline of admfast as deepinv's denoiser; images are in [0, 1]."""

        def __init__(self) -> None:
            super().__init__(device=pipe.device)
            self.net = pipe.net

        def forward(self, x: Tensor, sigma: Any, y: Any = None, **_: Any) -> Tensor:
            sigma = self._handle_sigma(sigma, batch_size=len(x), device=x.device, dtype=x.dtype)
            signal = torch.rsqrt(1 + 4 * sigma**2)  # in [-1, 1] the noise is twice as large
            noise = 2 * sigma * signal
            x_t = signal[:, None, None, None] * (2 * x - 1)
            x0 = _predict_x0(pipe, x_t, levels.timestep(signal, noise), signal, noise, y)
            return (x0.clamp(-1, 1) + 1) / 2

    return PipelineDenoiser()


def _azula_denoiser(pipe: Pipeline, rounded: bool) -> nn.Module:
    from azula.denoise import Denoiser, GaussianPosterior
    from azula.noise import VPSchedule

    levels = NoiseLevels(pipe, rounded, round_up=True)

    class PipelineDenoiser(Denoiser):
        """A pipeline of admfast as azula's denoiser; images are in [-1, 1]."""

        def __init__(self) -> None:
            super().__init__()
            self.net = pipe.net
            self.schedule = VPSchedule(alpha_min=1e-2, sigma_min=1e-2)

        def forward(self, x_t: Tensor, t: Tensor, label: Any = None, **_: Any) -> Any:
            signal, noise = (value.to(x_t).expand(len(x_t)) for value in self.schedule(t))
            # The network expects signal^2 + noise^2 = 1.
            scale = torch.rsqrt(signal**2 + noise**2)
            signal, noise = scale * signal, scale * noise
            t = levels.timestep(signal, noise)
            mean = _predict_x0(pipe, scale[:, None, None, None] * x_t, t, signal, noise, label)
            return GaussianPosterior(mean=mean, var=(noise**2)[:, None, None, None])

    return PipelineDenoiser()


_MAKERS: dict[str, Callable[[Pipeline, bool], nn.Module]] = {
    "azula": _azula_denoiser,
    "deepinv": _deepinv_denoiser,
}
