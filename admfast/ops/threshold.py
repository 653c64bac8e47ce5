"""Dynamic thresholding: x0 limited by its own size instead of by 1, image by image.

With s = max(the p-th percentile of |x0| over one image, 1)

    x0 <- clip(x0, -s, s) / s

(Saharia et al. 2022, "Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding",
section 2.3). It needs a reduction over the image before the update, so no row of a solver's table has it:
give it to the sampler as `denoised_fn=dynamic_threshold`; such rows leave the captured graph. The static
limit that follows (`Clip.USED`) then changes nothing, since all values are in [-1, 1].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from admfast import checks
from admfast.errors import invalid
from admfast.ops.dispatch import Implementation, OpTable


def dynamic_threshold_ref(x0: Tensor, percentile: float = 0.995, limit: float = 1.0) -> Tensor:
    """Reference of `dynamic_threshold`: a full sort; computes in float32, or float64 for float64 input."""
    wide = x0.to(torch.promote_types(x0.dtype, torch.float32))
    if x0.numel() == 0:
        return x0.clone()
    ordered = wide.flatten(1).abs().sort(dim=1).values
    position = percentile * (ordered.shape[1] - 1)
    low = math.floor(position)
    high = min(low + 1, ordered.shape[1] - 1)
    quantile = ordered[:, low]
    if position > low:  # else the next one has no share, though 0 times infinity is NaN
        quantile = torch.lerp(quantile, ordered[:, high], position - low)
    # A sort puts NaN last, where the percentile may not look.
    quantile = torch.where(ordered[:, -1].isnan(), math.nan, quantile)
    return _limited(wide, quantile, limit).to(x0.dtype)


def dynamic_threshold(
    x0: Tensor, percentile: float = 0.995, limit: float = 1.0, impl: str | None = None
) -> Tensor:
    """clip(x0, -s, s) / s with s = max(percentile of |x0|, limit) for every image by itself.

    Args:
        x0: [N, ...] of two dimensions or more, float16 to float64, any strides and any size (torch.quantile
            stops at 2^24 elements).
        percentile: p in [0, 1]; between two elements it is interpolated linearly, as torch.quantile does.
        limit: the least s, above 0; 1 is the range of images.
        impl: name of an implementation; None chooses.

    Returns: like x0, in [-1, 1]. An image in which anything is NaN is NaN throughout. An infinity above the
    percentile becomes 1 or -1 like every other large value; where the percentile itself is infinite the image
    has no scale: what is infinite in it becomes NaN, what is finite 0 or NaN.

    Raises: InvalidArgument for an x0 that isn't floating or has less than two dimensions, a percentile
    outside [0, 1], or a limit that isn't above 0 and finite.

    Accumulates nothing; float16 and bfloat16 compute in float32 and round once. Differentiable, s included,
    by autograd; where values are tied the gradient of s goes to one of them.
    """
    checks.floating("x0", x0)
    if x0.dim() < 2:
        raise invalid("x0.shape", tuple(x0.shape), "[N, ...] with two dimensions or more")
    checks.real("percentile", percentile, least=0, most=1)
    checks.real("limit", limit, above=0)
    return TABLE.choose(impl, x0, percentile, limit).forward(x0, percentile, limit)


def _selected(x0: Tensor, percentile: float = 0.995, limit: float = 1.0) -> Tensor:
    """Two selections instead of a sort: of the few values above the percentile where it is high."""
    if x0.numel() == 0:
        return x0.clone()
    wide = x0.to(torch.promote_types(x0.dtype, torch.float32))
    size = wide.flatten(1).abs()
    count = size.shape[1]
    position = percentile * (count - 1)
    low = math.floor(position)
    share = position - low
    above = count - low  # the value at `low` is the smallest of so many
    if above <= max(2, count // 4):
        # In descending order; NaN counts as the largest, as in a sort.
        top = size.topk(above, dim=1).values
        first, second = top[:, -1], top[:, -2] if above > 1 else top[:, -1]
        first = torch.where(top[:, 0].isnan(), math.nan, first)
    else:
        first = size.kthvalue(low + 1, dim=1).values
        # The next one is the same where values are tied, else the smallest above it.
        ties = (size <= first.detach()[:, None]).sum(1) > low + 1
        larger = size.masked_fill(size <= first.detach()[:, None], math.inf).amin(1)
        second = torch.where(ties, first, larger)
        first = torch.where(size.isnan().any(1), math.nan, first)
    if share == 0:
        return _limited(wide, first, limit).to(x0.dtype)
    return _limited(wide, torch.lerp(first, second, share), limit).to(x0.dtype)


def _limited(x0: Tensor, quantile: Tensor, limit: float) -> Tensor:
    """The formula, for the percentiles [N] of |x0|."""
    s = quantile.clamp(min=limit).view(-1, *(1,) * (x0.dim() - 1))
    return torch.clamp(x0, -s, s) / s


TABLE = OpTable(
    "dynamic_threshold",
    [Implementation("select", _selected), Implementation("reference", dynamic_threshold_ref)],
)
