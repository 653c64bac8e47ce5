"""Draw the random numbers of the k-th sample of a run; they depend only on the run's seed and k.

The generator is that of `admfast.ops.update.noise`: the key is the run's seed, the row is k, and every
purpose has a stream of its own (`TrainStream`). The streams from 64 on belong to the images (`DataStream`).
Every dropout layer has a stream, from 1024 on.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

from admfast.ops.update import MASK32, as_seeds, normal, philox4x32_10


class TrainStream(IntEnum):
    """Philox streams of training, by purpose."""

    TIMESTEP = 5
    NOISE = 6
    LOW_RES_STRENGTH = 7  # strength of the noise on the small image of an upsampler
    LOW_RES_NOISE = 8
    CLASS = 9  # whether the class is dropped
    DROPOUT = 1024  # of the first layer; the next one has 1025


def draw_uniforms(seed: int, sample_ids: Sequence[int], stream: TrainStream) -> Tensor:
    """Return a uniform number in [0, 1) per sample, float64 [N]: (word 0 * 2^21 + word 1 div 2^11) / 2^53."""
    key = (seed & MASK32, seed >> 32)
    words = [philox4x32_10((0, 0, k, int(stream)), key) for k in sample_ids]
    values = [((r0 << 21) | (r1 >> 11)) * 2.0**-53 for r0, r1, _, _ in words]
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def draw_normals(
    seed: int,
    sample_ids: Sequence[int],
    shape: tuple[int, ...],
    stream: TrainStream,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return standard normal noise for every sample, float32 [N, *shape], equal on every device."""
    key = as_seeds([seed]).to(device)
    return torch.cat([normal(key, shape, k, int(stream)) for k in sample_ids])
