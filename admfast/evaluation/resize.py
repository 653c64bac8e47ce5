"""Resize images as TensorFlow 1 does, for features that were trained and published with it."""

from __future__ import annotations

import torch
from torch import Tensor


def resize_bilinear(x: Tensor, height: int, width: int) -> Tensor:
    """Return images [N, C, H, W] resized to [N, C, height, width] by TensorFlow 1's ResizeBilinear, in
    float32.

    Output row i reads the input at i * (H / height), without an offset of half a pixel and without
    antialiasing, between the rows floor and floor + 1 (at most the last). torch's `interpolate` has no such
    mode. Columns first, then rows, each as low + (high - low) * fraction in float32.
    """
    x = x.float()
    for dim, size in ((3, width), (2, height)):
        if x.shape[dim] == size:
            continue
        position = torch.arange(size, device=x.device) * torch.tensor(
            x.shape[dim] / size, dtype=torch.float32
        )
        low = position.floor()
        fraction = (position - low).reshape([-1 if d == dim else 1 for d in range(4)])
        below = low.long().clamp_(max=x.shape[dim] - 1)
        above = (below + 1).clamp_(max=x.shape[dim] - 1)
        low_values, high_values = x.index_select(dim, below), x.index_select(dim, above)
        x = low_values + (high_values - low_values) * fraction
    return x
