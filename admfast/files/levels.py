"""Convert float images [N, C, *spatial] in [-1, 1] to uint8 [N, *spatial, C] and back, as published."""

from __future__ import annotations

import torch
from torch import Tensor


def to_uint8(x: Tensor) -> Tensor:
    """Return (x + 1) * 127.5, clamped to 0..255 and truncated (not rounded), channels last.

    Source: the published sampling scripts. x: [N, C, *spatial] float.
    """
    return ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8).movedim(1, -1).contiguous()


def from_uint8(images: Tensor) -> Tensor:
    """Return images / 127.5 - 1 as float32 [N, C, *spatial]. images: uint8 [N, *spatial, C]."""
    return (images.to(torch.float32) / 127.5 - 1).movedim(-1, 1).contiguous()
