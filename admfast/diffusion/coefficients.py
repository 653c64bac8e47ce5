"""The coefficients of a process in tensors on each device, indexed there by t without a transfer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from admfast.diffusion.schedule import FloatArray, Schedule
from admfast.errors import invalid


@dataclass(frozen=True)
class Coefficients:
    """The coefficients of one call; calling it with a name returns one at every t, shaped [N, 1, ...]."""

    table: Tensor  # [K, S]
    rows: dict[str, int]
    t: Tensor  # [N]
    shape: torch.Size  # of x: [N, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which the call computes: float32 or float64."""
        return self.table.dtype

    def __call__(self, name: str) -> Tensor:
        values = self.table[self.rows[name]].index_select(0, self.t)
        return values.view(-1, *[1] * (len(self.shape) - 1))

    def full(self, name: str) -> Tensor:
        """Return the coefficient as an expanded view of x's shape."""
        return self(name).expand(self.shape)


class CoefficientTables:
    """Every coefficient of a schedule, rounded once from float64 and uploaded once per device and dtype.

    schedule: see `make_schedule`. The first call uploads, so make one before a CUDA graph is captured.
    """

    def __init__(self, schedule: Schedule) -> None:
        columns = _compute_coefficients(schedule)
        self._rows = {name: row for row, name in enumerate(columns)}
        self._host = np.stack(list(columns.values()))
        self._model_timesteps = schedule.model_timesteps
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._model_t: dict[torch.device, Tensor] = {}

    def at(self, t: Tensor, *tensors: Tensor) -> Coefficients:
        """Return the coefficients at t for these [N, ...] tensors: float64 if one of them is, else float32.

        Raises: InvalidArgument for a t that is not [N] integers.
        """
        self._check(t, tensors[0].shape[:1])
        is_float64 = any(tensor.dtype == torch.float64 for tensor in tensors)
        dtype = torch.float64 if is_float64 else torch.float32
        table = self._tables.get((t.device, dtype))
        if table is None:
            # Rounded on the host, because not every device supports float64.
            table = self._tables[t.device, dtype] = _upload(self._host, t.device, dtype)
        return Coefficients(table, self._rows, t, tensors[0].shape)

    def model_t(self, t: Tensor) -> Tensor:
        """Return the timesteps that the network sees at t: [N], int64 or float32."""
        self._check(t, t.shape[:1])
        table = self._model_t.get(t.device)
        if table is None:
            table = self._model_t[t.device] = _upload(self._model_timesteps, t.device)
        return table.index_select(0, t)

    def _check(self, t: Tensor, shape: torch.Size) -> None:
        """Reject a t that isn't [N] integers; check the range on the CPU only, where it needs no transfer."""
        if t.dtype not in (torch.int64, torch.int32) or t.dim() != 1 or t.shape != shape:
            raise invalid("t", f"{t.dtype} {tuple(t.shape)}", f"int64 [N], here {tuple(shape)}")
        if t.device.type != "cpu" or t.numel() == 0 or torch.compiler.is_compiling():
            return
        steps = self._host.shape[1]
        low, high = int(t.min()), int(t.max())
        if low < 0 or high >= steps:
            raise invalid("t", low if low < 0 else high, f"steps from 0 to {steps - 1}")


def _upload(values: np.ndarray, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    # A tensor made in inference mode could not be used with autograd later.
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def _compute_coefficients(schedule: Schedule) -> dict[str, FloatArray]:
    """Return every coefficient of the formulas, float64 [S] each."""
    coef1, coef2 = schedule.posterior_mean_coef1, schedule.posterior_mean_coef2
    # The true posterior variance is 0 at t = 0; the published large variance is that of t = 1 there.
    first_variance = schedule.posterior_variance[1] if schedule.num_timesteps > 1 else schedule.betas[0]
    large_variance = np.append(first_variance, schedule.betas[1:])
    return {
        "sqrt_alphas_cumprod": schedule.sqrt_alphas_cumprod,
        "one_minus_alphas_cumprod": 1.0 - schedule.alphas_cumprod,
        "sqrt_one_minus_alphas_cumprod": schedule.sqrt_one_minus_alphas_cumprod,
        "log_one_minus_alphas_cumprod": schedule.log_one_minus_alphas_cumprod,
        "sqrt_recip_alphas_cumprod": schedule.sqrt_recip_alphas_cumprod,
        "sqrt_recipm1_alphas_cumprod": schedule.sqrt_recipm1_alphas_cumprod,
        "posterior_mean_coef1": coef1,
        "posterior_mean_coef2": coef2,
        "recip_posterior_mean_coef1": 1.0 / coef1,
        "posterior_mean_coef2_over_coef1": coef2 / coef1,
        "posterior_variance": schedule.posterior_variance,
        "posterior_log_variance_clipped": schedule.posterior_log_variance_clipped,
        "fixed_large_variance": large_variance,
        "fixed_large_log_variance": np.log(large_variance),
        "log_betas": np.log(schedule.betas),
    }
