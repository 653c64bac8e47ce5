"""Nearest-neighbour upsampling and average pooling by two, as the networks use them between levels.

With three spatial dimensions only the last two are resampled, as in the published networks.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from admfast.errors import invalid


def check_resample(x: Tensor, down: bool) -> None:
    """Raise InvalidArgument unless `x` is [N, C, *spatial]; if `down`, halved sizes must be 2 or more."""
    if not 3 <= x.dim() <= 5:
        raise invalid("x.shape", tuple(x.shape), "[N, C, *spatial] with one to three spatial dimensions")
    if down and min(x.shape[3 if x.dim() == 5 else 2 :]) < 2:
        raise invalid("x.shape", tuple(x.shape), "2 or more along every dimension that is halved")


def nearest_up(x: Tensor) -> Tensor:
    """Repeat every element twice along each resampled dimension: [N, C, *s] -> [N, C, *2s]; differentiable.

    Raises: InvalidArgument unless there are one to three spatial dimensions.
    """
    check_resample(x, down=False)
    if x.dim() == 5:
        return F.interpolate(x, (x.shape[2], x.shape[3] * 2, x.shape[4] * 2), mode="nearest")
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def avg_pool_down(x: Tensor) -> Tensor:
    """Average blocks of two along each resampled dimension: [N, C, *s] -> [N, C, *s//2]; differentiable.

    The last element of an odd size is dropped.

    Raises: InvalidArgument unless there are one to three spatial dimensions, and every halved one has size 2
        or more.
    """
    check_resample(x, down=True)
    if x.dim() == 3:
        return F.avg_pool1d(x, 2)
    if x.dim() == 4:
        return F.avg_pool2d(x, 2)
    # Depth is merged into the channels: torch's 3-D average pooling has no half precision on the CPU.
    return F.avg_pool2d(x.flatten(1, 2), 2).unflatten(1, x.shape[1:3])
