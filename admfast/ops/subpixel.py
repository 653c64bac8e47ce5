"""A 3x3 convolution of a nearest-doubled image, as four 2x2 convolutions of the image itself."""

from __future__ import annotations

import torch
from torch import Tensor

from admfast.errors import invalid
from admfast.ops.conv import FoldedConv, conv_ref
from admfast.ops.resample import nearest_up


def doubled_conv_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Reference of `SubpixelConv`: the convolution of `nearest_up(x)`, padded by one."""
    return conv_ref(nearest_up(x), weight, bias, padding=1)


def phase_weights(weight: Tensor) -> Tensor:
    """[C_out, C_in, 3, 3] -> [4 C_out, C_in, 2, 2]: the taps that meet on each pixel, added up in float64.

    Of a doubled row the even pixel 2i sees x_{i-1}, x_i, x_i and the odd one x_i, x_i, x_{i+1}: of the taps
    w0, w1, w2 that is (w0, w1 + w2) on (i - 1, i) and (w0 + w1, w2) on (i, i + 1). Phases of the row first.
    """
    w = weight.double()
    rows = [torch.stack([w[:, :, 0], w[:, :, 1] + w[:, :, 2]], 2)]
    rows.append(torch.stack([w[:, :, 0] + w[:, :, 1], w[:, :, 2]], 2))
    phases = []
    for row in rows:
        phases.append(torch.stack([row[..., 0], row[..., 1] + row[..., 2]], 3))
        phases.append(torch.stack([row[..., 0] + row[..., 1], row[..., 2]], 3))
    return torch.cat(phases).to(weight.dtype)


class SubpixelConv:
    """`conv(nearest_up(x))` of a 3x3 convolution, padded by one, with 4 of its 9 products a pixel.

    Derived from frozen weights [C_out, C_in, 3, 3], exactly but for the rounding of added taps. x [N, C_in,
    H, W] -> [N, C_out, 2H, 2W]; differentiable in x.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        dtype: torch.dtype | None = None,
        impl: str | None = None,
    ):
        if weight.dim() != 4 or tuple(weight.shape[2:]) != (3, 3):
            raise invalid("weight.shape", tuple(weight.shape), "[C_out, C_in, 3, 3]")
        self.channels = weight.shape[0]
        self.conv = FoldedConv(*_four(weight, bias), stride=1, padding=1, dtype=dtype, impl=impl)

    def refold(self, weight: Tensor, bias: Tensor | None) -> None:
        """Take new values into the same memory."""
        self.conv.refold(*_four(weight, bias))

    @property
    def nbytes(self) -> int:
        return self.conv.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        z = self.conv(x).movedim(1, -1)  # [N, H + 1, W + 1, 4 C_out]: every 2x2 window, padding included
        h, w = x.shape[2:]
        p = [
            z[:, i : i + h, j : j + w, k : k + self.channels]
            for k, (i, j) in zip(range(0, 4 * self.channels, self.channels), _PHASES, strict=True)
        ]
        if torch.is_grad_enabled() and z.requires_grad:
            y = torch.stack([torch.stack(p[:2], dim=3), torch.stack(p[2:], dim=3)], dim=2)
        else:
            y = z.new_empty((len(z), h, 2, w, 2, self.channels))
            for (i, j), phase in zip(_PHASES, p, strict=True):
                y[:, :, i, :, j] = phase
        return y.view(len(z), 2 * h, 2 * w, self.channels).movedim(-1, 1)


_PHASES = ((0, 0), (0, 1), (1, 0), (1, 1))


def _four(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return phase_weights(weight), None if bias is None else bias.repeat(4)
