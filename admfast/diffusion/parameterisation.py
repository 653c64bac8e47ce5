"""Enums of a diffusion network's predictions and of its training objective."""

from __future__ import annotations

import enum
from typing import TypeVar

from admfast.errors import allowed_names, invalid


class MeanType(enum.Enum):
    """The quantity that the output's mean channels predict (`ModelMeanType` of the published code)."""

    PREVIOUS_X = "PREVIOUS_X"  # the mean of x_{t-1}
    START_X = "START_X"  # x_0
    EPSILON = "EPSILON"  # the noise in x_t


class VarType(enum.Enum):
    """The source of the variance of p(x_{t-1} | x_t) (`ModelVarType` of the published code)."""

    LEARNED = "LEARNED"  # the output's second half is log sigma^2
    FIXED_SMALL = "FIXED_SMALL"  # the posterior variance
    FIXED_LARGE = "FIXED_LARGE"  # beta, and at t = 0 the posterior variance of t = 1
    LEARNED_RANGE = "LEARNED_RANGE"  # the output's second half in [-1, 1] interpolates between the two logs

    @property
    def learned(self) -> bool:
        """Tell whether the network predicts the variance; its output then has twice the channels of x."""
        return self in (VarType.LEARNED, VarType.LEARNED_RANGE)


class LossType(enum.Enum):
    """The training objective (`LossType` of the published code)."""

    MSE = "MSE"  # mean squared error, plus the variational term in bits if the variance is learned
    RESCALED_MSE = "RESCALED_MSE"  # MSE, but with the variational term times S / 1000
    KL = "KL"  # the variational term in bits
    RESCALED_KL = "RESCALED_KL"  # KL times S: an estimate of the whole bound

    def is_vb(self) -> bool:
        """Tell whether the loss is only the variational term."""
        return self in (LossType.KL, LossType.RESCALED_KL)


EnumT = TypeVar("EnumT", bound=enum.Enum)


def enum_member(kind: type[EnumT], value: EnumT | str, name: str) -> EnumT:
    """Return the member of `kind` that `value` is or names; `name` is the argument's name in errors.

    Raises: InvalidArgument with the nearest names.
    """
    if isinstance(value, kind):
        return value
    names = [entry.name for entry in kind]
    if isinstance(value, str) and value in names:
        return kind[value]
    raise invalid(name, value, allowed_names(value, names))
