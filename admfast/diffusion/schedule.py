"""Noise schedules: betas, the float64 arrays computed from them, and the timesteps that the network sees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from admfast.checks import one_of, whole_number
from admfast.diffusion.respacing import FloatArray, Respacing, kept_timesteps, timesteps_at
from admfast.errors import invalid

IntArray = npt.NDArray[np.int64]

NOISE_SCHEDULES = ("linear", "cosine")

# With rescaling, the network sees timesteps in 0..1000 for any length of the process.
TIMESTEP_SCALE = 1000.0


def beta_schedule(name: str, steps: int) -> FloatArray:
    """Return beta_t, t = 0..steps-1, of a named noise schedule as float64 [steps].

    "linear": evenly spaced from 1e-4 s to 2e-2 s, s = 1000 / steps (Ho et al. 2020, for any length).
    "cosine": 1 - f((t+1)/steps) / f(t/steps), at most 0.999, f(u) = cos^2((u + 0.008) / 1.008 * pi / 2)
    (Nichol & Dhariwal 2021, eq. 17).
    Source: `get_named_beta_schedule` of the published code.

    name: "linear" or "cosine". steps: at least 1; at least 20 for "linear", whose last beta is 20 / steps.
    Raises: InvalidArgument.
    """
    one_of("noise_schedule", name, NOISE_SCHEDULES)
    steps = whole_number("steps", steps, 1)
    if name == "linear":
        if steps < 20:
            raise invalid("steps", steps, "a linear schedule takes at least 20, its last beta is 20 / steps")
        scale = 1000 / steps
        return np.linspace(scale * 1e-4, scale * 2e-2, steps, dtype=np.float64)
    # math.cos, not np.cos: the two differ in the last bit, and 1 - ratio magnifies it.
    bar = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
    return np.array([min(1 - bar[i + 1] / bar[i], 0.999) for i in range(steps)], dtype=np.float64)


@dataclass(frozen=True, eq=False)
class Schedule:
    """A forward process q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t), t = 0..S-1, in float64.

    Source: `GaussianDiffusion.__init__` and `SpacedDiffusion` of the published code.

    The arrays have the names of the published code, are float64 [S] and read-only. With alpha_bar_t =
    prod_{s<=t} (1 - beta_s):

    betas, alphas_cumprod (alpha_bar), alphas_cumprod_prev (first 1), alphas_cumprod_next (last 0),
    sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod, log_one_minus_alphas_cumprod,
    sqrt_recip_alphas_cumprod = alpha_bar^-1/2, sqrt_recipm1_alphas_cumprod = (1/alpha_bar - 1)^1/2,
    posterior_variance = beta (1 - alpha_bar_prev) / (1 - alpha_bar), 0 at t = 0,
    posterior_log_variance_clipped: its log, with the value of t = 1 at t = 0 (of beta_0 if S = 1),
    posterior_mean_coef1 (of x_0) and posterior_mean_coef2 (of x_t) of q(x_{t-1} | x_t, x_0).

    timestep_map: the timestep of the original process at each t, int64 [S]; float64 if some lie in between.
    original_steps: length of the original process.
    rescale_timesteps: the network sees float32 timesteps scaled to 0..1000.
    origin: the schedule of the original process; None if this is the original.
    model_timesteps: the timestep that the network sees at each t, int64 [S] or float32 [S].
    Raises: InvalidArgument for betas outside (0, 1] or arrays that don't fit together.
    """

    betas: FloatArray
    timestep_map: IntArray | FloatArray
    original_steps: int
    rescale_timesteps: bool = False
    origin: Schedule | None = field(default=None, repr=False)
    model_timesteps: npt.NDArray[np.generic] = field(init=False, repr=False)
    alphas_cumprod: FloatArray = field(init=False, repr=False)
    alphas_cumprod_prev: FloatArray = field(init=False, repr=False)
    alphas_cumprod_next: FloatArray = field(init=False, repr=False)
    sqrt_alphas_cumprod: FloatArray = field(init=False, repr=False)
    sqrt_one_minus_alphas_cumprod: FloatArray = field(init=False, repr=False)
    log_one_minus_alphas_cumprod: FloatArray = field(init=False, repr=False)
    sqrt_recip_alphas_cumprod: FloatArray = field(init=False, repr=False)
    sqrt_recipm1_alphas_cumprod: FloatArray = field(init=False, repr=False)
    posterior_variance: FloatArray = field(init=False, repr=False)
    posterior_log_variance_clipped: FloatArray = field(init=False, repr=False)
    posterior_mean_coef1: FloatArray = field(init=False, repr=False)
    posterior_mean_coef2: FloatArray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        betas = np.array(self.betas, dtype=np.float64)
        if betas.ndim != 1 or betas.size == 0:
            raise invalid("betas", betas.shape, "must have one dimension and at least one step")
        outside = ~((betas > 0) & (betas <= 1))
        if outside.any():
            step = int(np.argmax(outside))
            raise invalid(f"betas[{step}]", float(betas[step]), "greater than 0, at most 1")
        steps = whole_number("original_steps", self.original_steps, len(betas))
        timesteps = np.array(self.timestep_map)
        if timesteps.shape != betas.shape or timesteps.dtype.kind not in "iuf":
            raise invalid(
                "timestep_map", f"{timesteps.dtype} {timesteps.shape}", f"numbers of shape {betas.shape}"
            )
        if not (timesteps[0] >= 0 and timesteps[-1] <= steps - 1 and (np.diff(timesteps) > 0).all()):
            raise invalid("timestep_map", timesteps.tolist(), f"rising, from 0 to {steps - 1}")
        is_whole = timesteps.dtype.kind in "iu"
        timestep_map = timesteps.astype(np.int64 if is_whole else np.float64)
        arrays = {"betas": betas, "timestep_map": timestep_map, **_derive_arrays(betas)}
        arrays["model_timesteps"] = timestep_map if is_whole else timestep_map.astype(np.float32)
        if self.rescale_timesteps:
            # Both factors are rounded to float32 first, as torch multiplies a float32 tensor by a number.
            arrays["model_timesteps"] = timesteps.astype(np.float32) * np.float32(TIMESTEP_SCALE / steps)
        for name, values in arrays.items():
            values.flags.writeable = False
            object.__setattr__(self, name, values)

    @classmethod
    def from_betas(
        cls,
        betas: npt.ArrayLike,
        *,
        timestep_map: Sequence[int] | IntArray | None = None,
        original_steps: int | None = None,
        rescale_timesteps: bool = False,
    ) -> Schedule:
        """Return the schedule of these betas; by default they are the original process, and t maps to t.

        betas: [S], in (0, 1]. timestep_map: [S], strictly increasing. original_steps: at least S.
        Raises: InvalidArgument.
        """
        array = np.array(betas, dtype=np.float64)
        timesteps = np.arange(array.size) if timestep_map is None else np.asarray(timestep_map)
        steps = array.size if original_steps is None else original_steps
        return cls(array, timesteps, steps, rescale_timesteps)

    @property
    def num_timesteps(self) -> int:
        """Number of kept steps, S."""
        return len(self.betas)

    @property
    def original(self) -> Schedule:
        """Return the schedule of the original process."""
        return self if self.origin is None else self.origin

    @property
    def integer_t(self) -> bool:
        """Tell whether the network sees whole timesteps."""
        return self.model_timesteps.dtype.kind == "i"

    def respaced(self, steps: Sequence[float] | IntArray | FloatArray) -> Schedule:
        """Return the schedule of only these steps; over them, beta_i = 1 - alpha_bar_i / alpha_bar_{i-1}.

        The betas are recomputed even if every step is kept, as in `SpacedDiffusion` of the published code:
        they then differ from the given ones by rounding.

        steps: indices into this schedule, strictly increasing, at least one. With floats, the log-SNR and the
        timestep are linear in the index. Raises: InvalidArgument.
        """
        index = np.asarray(steps)
        if index.ndim != 1 or index.size == 0 or index.dtype.kind not in "iuf":
            raise invalid("steps", steps, "at least one number")
        if not (index[0] >= 0 and index[-1] <= self.num_timesteps - 1 and (np.diff(index) > 0).all()):
            raise invalid("steps", index.tolist(), f"rising, from 0 to {self.num_timesteps - 1}")
        if index.dtype.kind in "iu":
            alpha_bar, timesteps = self.alphas_cumprod[index], self.timestep_map[index]
        else:
            log_snr = self.log_snr(index)
            if not np.isfinite(log_snr).all():
                raise invalid("steps", index.tolist(), "whole numbers where alpha_bar is 0")
            alpha_bar = 1 / (1 + np.exp(-log_snr))
            timesteps = np.interp(index, np.arange(self.num_timesteps), self.timestep_map)
        betas = 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])
        return Schedule(betas, timesteps, self.original_steps, self.rescale_timesteps, self.original)

    def model_t(self, index: float) -> int | float:
        """Return the timestep that the network sees at step `index`.

        timestep_map[index] as an int, or as a float if it isn't whole, or its float32 product with
        1000 / original_steps if rescaling is on.
        Between two steps, timestep_map is interpolated linearly in float64 and the result is a float.

        index: 0..S-1. Raises: InvalidArgument.
        """
        if not 0 <= index <= self.num_timesteps - 1:
            raise invalid("index", index, f"from 0 to {self.num_timesteps - 1}")
        if index == int(index):
            timestep: int | float = self.model_timesteps[int(index)].item()
            return timestep
        interpolated = np.interp(index, np.arange(self.num_timesteps), self.timestep_map)
        return self.network_timestep(float(interpolated))

    def network_timestep(self, t: float) -> float:
        """Return the timestep that the network sees at timestep t of the original process."""
        return t * (TIMESTEP_SCALE / self.original_steps if self.rescale_timesteps else 1.0)

    def timesteps_at(self, log_snr: npt.ArrayLike) -> FloatArray:
        """Return the timesteps of the original process with this log-SNR, linear between whole timesteps.

        log_snr: any shape. Raises: InvalidArgument for a value that the original process does not reach.
        """
        return timesteps_at(log_snr, self.original.log_snr(np.arange(self.original.num_timesteps)))

    def log_snr(self, index: npt.ArrayLike) -> FloatArray:
        """Return log(alpha_bar / (1 - alpha_bar)), linear in the index between steps; float64, same shape.

        index: 0..S-1, any shape. Raises: InvalidArgument.
        """
        positions = np.asarray(index, dtype=np.float64)
        if not ((positions >= 0) & (positions <= self.num_timesteps - 1)).all():
            raise invalid("index", index, f"from 0 to {self.num_timesteps - 1}")
        with np.errstate(divide="ignore"):
            log_snr_of_steps = np.log(self.alphas_cumprod) - self.log_one_minus_alphas_cumprod
        return np.asarray(np.interp(positions, np.arange(self.num_timesteps), log_snr_of_steps))


def _derive_arrays(betas: FloatArray) -> dict[str, npt.NDArray[np.generic]]:
    """Return the arrays of `Schedule` that are computed from the betas."""
    alphas = 1.0 - betas
    alpha_bar = np.cumprod(alphas)
    alpha_bar_prev = np.append(1.0, alpha_bar[:-1])
    variance = betas * (1.0 - alpha_bar_prev) / (1.0 - alpha_bar)
    # A last beta of exactly 1 (linear, 20 steps) leaves no signal: alpha_bar is 0, its inverse is infinite.
    with np.errstate(divide="ignore"):
        inverse_alpha_bar = 1.0 / alpha_bar
    return {
        "alphas_cumprod": alpha_bar,
        "alphas_cumprod_prev": alpha_bar_prev,
        "alphas_cumprod_next": np.append(alpha_bar[1:], 0.0),
        "sqrt_alphas_cumprod": np.sqrt(alpha_bar),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - alpha_bar),
        "log_one_minus_alphas_cumprod": np.log(1.0 - alpha_bar),
        "sqrt_recip_alphas_cumprod": np.sqrt(inverse_alpha_bar),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(inverse_alpha_bar - 1),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(
            np.append(variance[1] if len(betas) > 1 else betas[0], variance[1:])
        ),
        "posterior_mean_coef1": betas * np.sqrt(alpha_bar_prev) / (1.0 - alpha_bar),
        "posterior_mean_coef2": (1.0 - alpha_bar_prev) * np.sqrt(alphas) / (1.0 - alpha_bar),
    }


def make_schedule(
    noise_schedule: str = "linear",
    steps: int = 1000,
    respacing: Respacing | None = "",
    rescale_timesteps: bool = False,
) -> Schedule:
    """Return the float64 schedule of a diffusion process.

    For other betas see `Schedule.from_betas`. Source: `create_gaussian_diffusion` of the published code.

    noise_schedule: "linear" or "cosine". steps: length of the original process.
    respacing: which steps to keep, see `kept_timesteps` and `space_timesteps`; "" keeps all and recomputes
      the betas from alpha_bar, None keeps the process unchanged (the published class without its respacing
      wrapper).
    rescale_timesteps: the network sees float timesteps in 0..1000.
    Raises: InvalidArgument.
    """
    base = Schedule.from_betas(
        beta_schedule(noise_schedule, steps), rescale_timesteps=bool(rescale_timesteps)
    )
    if respacing is None:
        return base
    timesteps = kept_timesteps(respacing, base.log_snr(np.arange(base.num_timesteps)))
    if not timesteps:
        raise invalid("respacing", respacing, "at least one step")
    return base.respaced(timesteps)
