"""The diffusion process as pure maths: schedules in float64 on the host, formulas on tensors, no network."""

from admfast.diffusion.config import DiffusionConfig
from admfast.diffusion.gaussian import (
    approx_standard_normal_cdf,
    discretized_gaussian_log_likelihood,
    mean_flat,
    normal_kl,
)
from admfast.diffusion.likelihood import (
    BitsPerDimension,
    VbTerms,
    bits_per_dimension,
    prior_bpd,
    vb_terms_bpd,
)
from admfast.diffusion.losses import training_losses
from admfast.diffusion.parameterisation import LossType, MeanType, VarType
from admfast.diffusion.process import GaussianDiffusion, GaussianMoments, PMeanVariance
from admfast.diffusion.respacing import (
    SPACINGS,
    Respacing,
    check_respacing,
    kept_timesteps,
    space_timesteps,
)
from admfast.diffusion.schedule import NOISE_SCHEDULES, Schedule, beta_schedule, make_schedule

__all__ = [
    "NOISE_SCHEDULES",
    "SPACINGS",
    "BitsPerDimension",
    "DiffusionConfig",
    "GaussianDiffusion",
    "GaussianMoments",
    "LossType",
    "MeanType",
    "PMeanVariance",
    "Respacing",
    "Schedule",
    "VarType",
    "VbTerms",
    "approx_standard_normal_cdf",
    "beta_schedule",
    "bits_per_dimension",
    "check_respacing",
    "discretized_gaussian_log_likelihood",
    "kept_timesteps",
    "make_schedule",
    "mean_flat",
    "normal_kl",
    "prior_bpd",
    "space_timesteps",
    "training_losses",
    "vb_terms_bpd",
]
