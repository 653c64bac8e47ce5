"""GroupNorm with affine, optional adaptive scale and shift, optional SiLU, optional resampling: one op.

Every normalisation of an ADM network is one call of `group_norm_silu`; the skip concatenation of the up path
enters as a second source, so that an implementation need not write it.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from admfast.errors import invalid
from admfast.ops.dispatch import Implementation, OpTable
from admfast.ops.resample import avg_pool_down, check_resample, nearest_up

Resample = Literal["up", "down"] | None


def group_norm_silu_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int = 32,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
    resample: Resample = None,
    x2: Tensor | None = None,
) -> Tensor:
    """Reference of `group_norm_silu` in plain PyTorch; computes in float32, or float64 for float64 input."""
    source = x if x2 is None else torch.cat([x, x2], dim=1)
    wide = torch.promote_types(source.dtype, torch.float32)
    # The published layer rounds to the input's dtype between norm, affine, SiLU and averaging; here only the
    # result is rounded. Contiguous, because torch's channels_last kernel on the CPU takes the variance as
    # E[x^2] - E[x]^2: at mean 100 and deviation 1 its float32 result is off by 4e-3. torch.group_norm, since
    # F.group_norm refuses one value a group in a batch of one.
    y = torch.group_norm(source.to(wide).contiguous(), groups, weight.to(wide), bias.to(wide), eps)
    if scale is not None and shift is not None:
        spatial = (...,) + (None,) * (x.dim() - 2)
        y = y * (1 + scale.to(wide)[spatial]) + shift.to(wide)[spatial]
    if silu:
        y = F.silu(y)
    if resample == "down":
        y = avg_pool_down(y)
    y = y.to(source.dtype, memory_format=_memory_format(source))
    return nearest_up(y) if resample == "up" else y


def _memory_format(x: Tensor) -> torch.memory_format:
    """The channels_last format that `x` has, else contiguous."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(x.dim(), torch.contiguous_format)
    return last if x.is_contiguous(memory_format=last) and not x.is_contiguous() else torch.contiguous_format


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int = 32,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
    resample: Resample = None,
    x2: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Compute `y = act(GN(x) * (1 + scale) + shift)`, resampled by two where asked for.

    `GN(x) = (x - mean) / sqrt(var + eps) * weight + bias` over each of `groups` groups of channels and all
    positions; `act` is `u * sigmoid(u)` where `silu`, else the identity. Source: Wu & He 2018 for GN,
    Dhariwal & Nichol 2021 (section 3.1, adaptive group normalisation) for the order of scale, shift and SiLU.

    Args:
        x: [N, C1, *spatial], float16, bfloat16, float32 or float64, one to three spatial dimensions.
        weight, bias: [C] with C = C1 + C2; any floating dtype.
        groups: number of groups G; must divide C.
        eps: added to the variance (biased).
        scale, shift: [N, C], both or neither.
        silu: apply SiLU.
        resample: None, "up" (nearest, 2x) or "down" (mean over blocks of 2, odd remainders dropped); it is
            applied to the activated output in every spatial dimension but, for 3-D input, the first.
        x2: [N, C2, *spatial], a second source whose channels follow those of `x`.
        impl: name of an implementation (see `admfast info`); None chooses.

    Returns:
        [N, C, *resampled], dtype of `x`; channels_last where `x` (and `x2`) is.

    Raises:
        InvalidArgument: for shapes that don't fit, `groups` that doesn't divide C, x that isn't floating, or
            a dimension of size 1 that would be halved.

    Accumulates in float32 (float64 for float64 input). Differentiable in x, x2, weight, bias, scale, shift.
    """
    _check(x, weight, bias, groups, scale, shift, resample, x2)
    entry = TABLE.choose(
        impl, x, weight, bias, groups, eps, scale=scale, shift=shift, silu=silu, resample=resample, x2=x2
    )
    return entry.forward(
        x, weight, bias, groups, eps, scale=scale, shift=shift, silu=silu, resample=resample, x2=x2
    )


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    scale: Tensor | None,
    shift: Tensor | None,
    resample: Resample,
    x2: Tensor | None,
) -> None:
    """Refuse, by name, what no implementation could compute."""
    if not 3 <= x.dim() <= 5:
        raise invalid("x.shape", tuple(x.shape), "[N, C, *spatial] with one to three spatial dimensions")
    if not x.dtype.is_floating_point:
        raise invalid("x.dtype", x.dtype, "a floating dtype")
    channels = x.shape[1]
    if x2 is not None:
        if x2.shape[0] != x.shape[0] or x2.shape[2:] != x.shape[2:]:
            raise invalid(
                "x2.shape", tuple(x2.shape), f"must equal x's {tuple(x.shape)} but for the channels"
            )
        if x2.dtype != x.dtype:
            raise invalid("x2.dtype", x2.dtype, f"must equal x's {x.dtype}")
        channels += x2.shape[1]
    if groups < 1 or channels % groups:
        raise invalid("groups", groups, f"must divide the {channels} channels")
    for name, value in (("weight", weight), ("bias", bias)):
        if value.shape != (channels,):
            raise invalid(f"{name}.shape", tuple(value.shape), f"must be ({channels},)")
    if (scale is None) != (shift is None):
        raise invalid("scale, shift", (scale is not None, shift is not None), "give both or neither")
    for name, given in (("scale", scale), ("shift", shift)):
        if given is not None and given.shape != (x.shape[0], channels):
            raise invalid(f"{name}.shape", tuple(given.shape), f"must be {(x.shape[0], channels)}")
    if resample not in (None, "up", "down"):
        raise invalid("resample", resample, "None, 'up' or 'down'")
    check_resample(x, down=resample == "down")


TABLE = OpTable("group_norm_silu", [Implementation("reference", group_norm_silu_ref)])
