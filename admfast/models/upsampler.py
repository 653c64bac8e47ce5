"""The super-resolution variant of the UNet (ADM-U)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from admfast.errors import invalid
from admfast.models.config import UpsamplerConfig
from admfast.models.unet import UNet


class Upsampler(UNet):
    """A UNet conditioned on a low-resolution image, enlarged bilinearly and concatenated to x."""

    input_copies = 2

    def __init__(self, config: UpsamplerConfig):
        super().__init__(config)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        timesteps: Tensor,
        y: Tensor | None = None,
        low_res: Tensor | None = None,
        projected: Tensor | None = None,
    ) -> Tensor:
        """Return `UNet.forward` of x and `low_res` [N, C, h, w] in the range of x; differentiable in both."""
        if low_res is None:
            raise invalid("low_res", None, "an upsampler needs the low-resolution image [N, C, h, w]")
        channels = self.config.in_channels
        if low_res.dim() != x.dim() or low_res.shape[:2] != (x.shape[0], channels):
            raise invalid("low_res.shape", tuple(low_res.shape), f"[{x.shape[0]}, {channels}, ...]")
        mode = {3: "linear", 4: "bilinear", 5: "trilinear"}[x.dim()]
        upsampled = F.interpolate(low_res, x.shape[2:], mode=mode, align_corners=False)
        return super().forward(torch.cat([x, upsampled.to(x.dtype)], dim=1), timesteps, y, projected)
