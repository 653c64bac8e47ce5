"""Prepare tensors for the launchers of `group_norm_silu`: layout, sizes under resampling, allocation."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from admfast.kernels.norm_launch import Shape
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def is_channels_last(x: Tensor) -> bool:
    """Tell whether `x` is dense and the channels of each position are adjacent."""
    return x.movedim(1, -1).is_contiguous()


@dataclass(frozen=True)
class ChannelSums:
    """Statistics of every channel of a tensor of N images and C channels over chunks of its positions.

    values: [N, chunks, 3, C] float32: the mean as a sum of two, and the sum of squared deviations from it.
    chunk: positions of a chunk; the last may have fewer.
    """

    values: Tensor
    chunk: int

    @property
    def chunks(self) -> int:
        return self.values.shape[1]


def channels_last(t: Tensor | None) -> Tensor | None:
    """Return `t` dense and channels-last; a copy where it isn't."""
    return None if t is None else t.movedim(1, -1).contiguous().movedim(-1, 1)


def empty(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a dense channels-last tensor [N, C, *spatial], in the dtype of `like` for None."""
    last = (shape[0], *shape[2:], shape[1])
    return torch.empty(last, dtype=dtype or like.dtype, device=like.device).movedim(-1, 1)


def empty_float(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def with_consecutive_channels(t: Tensor | None) -> Tensor | None:
    """Return `t` [N, C] or [C] with consecutive channels; a copy where they aren't."""
    return t if t is None or t.stride(-1) == 1 else t.contiguous()


@dataclass(frozen=True)
class Geometry:
    """Sizes of a call: images, channels of both sources, spatial sizes before resampling."""

    n: int
    c1: int
    c2: int
    spatial: tuple[int, ...]
    resample: str | None

    @property
    def empty(self) -> bool:
        """True if the call has no elements, so that nothing is launched."""
        return self.n * (self.c1 + self.c2) * math.prod(self.spatial) == 0

    @property
    def dims(self) -> int:
        """Number of dimensions that `resample` applies to: 1 or 2."""
        return min(len(self.spatial), 2)

    @property
    def height(self) -> int:
        return self.spatial[-2] if self.dims == 2 else 1

    @property
    def out_spatial(self) -> tuple[int, ...]:
        """Spatial sizes of the output."""
        leading, resampled = self.spatial[: -self.dims], self.spatial[-self.dims :]
        if self.resample is None:
            return self.spatial
        return (*leading, *(2 * s if self.resample == "up" else s // 2 for s in resampled))

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes as arguments of a kernel."""
        return dict(
            N=self.n,
            P=math.prod(self.spatial),
            P_OUT=math.prod(self.out_spatial),
            H=self.height,
            W=self.spatial[-1],
            C1=self.c1,
            C2=self.c2,
        )

    def shape(self, groups: int, x: Tensor) -> Shape:
        sources = 2 if self.c2 else 1
        return Shape(self.n, math.prod(self.spatial), self.c1 + self.c2, groups, x.element_size(), sources)


def geometry(x: Tensor, x2: Tensor | None, resample: str | None) -> Geometry:
    """Return the sizes of a call; raises ValueError for a layout or dtype that the kernels can't read."""
    for name, t in (("x", x), ("x2", x2)):
        if t is not None and not is_channels_last(t):
            raise ValueError(f"{name}: strides {t.stride()} of {tuple(t.shape)} aren't dense channels-last")
    if x.dtype not in DTYPES:
        raise ValueError(f"x.dtype={x.dtype}: one of {', '.join(map(str, DTYPES))}")
    return Geometry(x.shape[0], x.shape[1], 0 if x2 is None else x2.shape[1], tuple(x.shape[2:]), resample)


def x_bias_arguments(x_bias: Tensor | None) -> dict[str, Any]:
    """Return the arguments of a kernel that describe x_bias, [C] or [N, C]."""
    x_bias = with_consecutive_channels(x_bias)
    return dict(
        x_bias_ptr=x_bias, x_bias_stride=0 if x_bias is None or x_bias.dim() == 1 else x_bias.stride(0)
    )


def affine_arguments(
    weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None
) -> dict[str, Any]:
    """Return the arguments of a kernel that describe weight, bias, scale and shift."""
    scale, shift = with_consecutive_channels(scale), with_consecutive_channels(shift)
    return dict(
        weight_ptr=weight.contiguous(),
        bias_ptr=bias.contiguous(),
        scale_ptr=scale,
        shift_ptr=shift,
        scale_stride=0 if scale is None else scale.stride(0),
        shift_stride=0 if shift is None else shift.stride(0),
    )
