"""Turn a network's output into predictions of noise, clean image and log-variance, differentiably."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from admfast import checks
from admfast.diffusion import DiffusionConfig, MeanType, VarType
from admfast.errors import invalid
from admfast.ops.transforms import plain_eager_mode

Model = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Prediction:
    """Prediction at x_t: noise eps, clean image x0 (not clipped), and log_var of p(x_{t-1} | x_t).

    All have x_t's shape and dtype and are differentiable with respect to x_t. first: during sampling, the
    index of the batch's first image among all requested images; otherwise 0.
    """

    eps: Tensor
    x0: Tensor
    log_var: Tensor
    first: int = 0


class Predictor:
    """Turn a network's output at any t of the original process into a `Prediction`.

    Integer t uses the published formulas with the process's own coefficients. For float t the log-SNR and the
    coefficients of the log-variance are interpolated linearly in t.
    """

    def __init__(self, config: DiffusionConfig):
        self.process = config.build("")
        s = self.process.schedule
        coefficients = [(float(s.log_snr(i)), *self._log_variance(i)) for i in range(s.num_timesteps)]
        # [S, 3]: log-SNR, l0, l1
        self._coefficients = torch.tensor(coefficients, dtype=torch.float64, device="cpu")
        self._coefficients_on_device: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def __call__(self, model: Model, x_t: Tensor, t: Tensor | float | Sequence[float]) -> Prediction:
        """Call model(x_t, t) and read its output; see `Pipeline.predict`."""
        t = self._normalize_timesteps(t, x_t)
        return self.read_output(model(x_t, self._model_timesteps(t, x_t)), x_t, t)

    def _normalize_timesteps(self, t: Tensor | float | Sequence[float], x_t: Tensor) -> Tensor:
        """Return the timestep of every image, [N]: int64 if whole numbers were given, else float."""
        last = self.process.num_timesteps - 1
        if not isinstance(t, Tensor) or (t.dim() == 0 and t.is_floating_point() and not t.requires_grad):
            # A number, a list or an array: 500.0 means the integer timestep 500.
            values = [
                checks.finite_float("t", item, least=0, most=last)
                for item in checks.as_list(checks.to_python(t))
            ]
            dtype = torch.int64 if all(item.is_integer() for item in values) else _compute_dtype(x_t)
            if len(values) == 1:
                return torch.full((len(x_t),), values[0], dtype=dtype, device=x_t.device)
            t = torch.tensor(values, dtype=dtype, device="cpu")
        elif t.dtype == torch.bool or t.is_complex():
            raise invalid("t.dtype", t.dtype, "whole numbers or floats")
        elif t.device.type == "cpu" and not bool(((t >= 0) & (t <= last)).all()):
            raise invalid("t", t.tolist(), f"0 to {last}")
        if tuple(t.shape) not in ((), (1,), (len(x_t),)):
            raise invalid("t.shape", tuple(t.shape), f"a number, [1] or [{len(x_t)}]")
        return (t if t.is_floating_point() else t.long()).to(x_t.device).expand(len(x_t))

    def read_output(self, out: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """Return the `Prediction` of the network's output at (x_t, t). t: [N], of the original process."""
        predict_at_t = self._predict_at_float_t if t.is_floating_point() else self._predict_at_integer_t
        prediction = predict_at_t(out, x_t, t)
        eps, x0, log_var = (
            value.to(x_t.dtype) for value in (prediction.eps, prediction.x0, prediction.log_var)
        )
        return Prediction(eps, x0, log_var)

    def _model_timesteps(self, t: Tensor, x_t: Tensor) -> Tensor:
        """Return the timesteps that the network is called with, [N]."""
        if not t.is_floating_point():
            return self.process.model_t(t)
        s, t = self.process.schedule, t.to(_compute_dtype(x_t))
        return t * (1000 / s.original_steps) if s.rescale_timesteps else t

    def _log_variance(self, i: int) -> tuple[float, float]:
        """Return (l0, l1) of log_var = l0 + l1 v at step i, finite even where a sampler's variance is 0."""
        if self.process.var_type is VarType.FIXED_SMALL:
            return float(self.process.schedule.posterior_log_variance_clipped[i]), 0.0
        return self.process.log_variance_coefficients(i)

    def _predict_at_integer_t(self, out: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """Return the prediction at integer t."""
        out = out.to(x_t.dtype)
        p = self.process.p_mean_variance(out, x_t, t, clip_denoised=False)
        mean_part, _ = self.process.split_output(out, x_t)
        if self.process.mean_type is MeanType.EPSILON:
            return Prediction(mean_part, p.pred_xstart, p.log_variance)
        eps = self.process.predict_eps_from_xstart(x_t, t, p.pred_xstart)
        return Prediction(eps, p.pred_xstart, p.log_variance)

    def _predict_at_float_t(self, out: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """Return the prediction at float t, whole or fractional."""
        if self.process.mean_type is MeanType.PREVIOUS_X:
            raise invalid("t", "float", "whole timesteps, for a network that predicts the previous x")
        compute_dtype = _compute_dtype(x_t)
        t = t.to(compute_dtype)
        out, v = self.process.split_output(out.to(compute_dtype), x_t)
        shape = (-1,) + (1,) * (x_t.dim() - 1)
        log_snr, l0, l1 = (column.view(shape) for column in self._interpolate_columns(t).unbind(1))
        signal, noise = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
        log_var = l0.expand_as(x_t) if v is None else l0 + l1 * v
        if self.process.mean_type is MeanType.EPSILON:
            return Prediction(out, (x_t - noise * out) / signal, log_var)
        return Prediction((x_t - signal * out) / noise, out, log_var)

    def _interpolate_columns(self, t: Tensor) -> Tensor:
        """Return the columns interpolated at float t, [N, 3]; they are copied to each device once."""
        key = (t.device, t.dtype)
        if key not in self._coefficients_on_device:
            with plain_eager_mode():
                self._coefficients_on_device[key] = self._coefficients.to(device=t.device, dtype=t.dtype)
        table = self._coefficients_on_device[key]
        low = t.floor().long().clamp(0, len(table) - 1)
        high = (low + 1).clamp(max=len(table) - 1)
        fraction = (t - low)[:, None]
        return torch.where(fraction == 0, table[low], (1 - fraction) * table[low] + fraction * table[high])


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of the arithmetic: float32, or float64 for float64 images."""
    return torch.promote_types(x.dtype, torch.float32)
