"""Networks of another program in the style of EDM, written from the formulas: their convolutions resample.

They are plain modules that use no code of admfast. Tests compare the converted networks with them.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.functional import silu


class GroupNorm(nn.Module):
    """A group norm that isn't a subclass of torch's."""

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.num_groups, self.eps = min(32, channels // 4), eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class Conv2d(nn.Module):
    """Optional resampling with a separable filter, then a convolution if `kernel` is nonzero."""

    def __init__(self, in_channels, out_channels, kernel, up=False, down=False, taps=(1, 1)):
        super().__init__()
        self.in_channels, self.out_channels, self.up, self.down = in_channels, out_channels, up, down
        shape = (out_channels, in_channels, kernel, kernel)
        self.weight = nn.Parameter(torch.zeros(shape)) if kernel else None
        self.bias = nn.Parameter(torch.zeros(out_channels)) if kernel else None
        row = torch.tensor(taps, dtype=torch.float32) / sum(taps)
        self.register_buffer("resample_filter", torch.outer(row, row)[None, None] if up or down else None)

    def forward(self, x):
        if self.up or self.down:
            taps = self.resample_filter.to(x.dtype).tile([self.in_channels, 1, 1, 1])
            around = (taps.shape[-1] - 1) // 2
            if self.up:
                x = F.conv_transpose2d(x, 4 * taps, stride=2, padding=around, groups=self.in_channels)
            else:
                x = F.conv2d(x, taps, stride=2, padding=around, groups=self.in_channels)
        if self.weight is None:
            return x
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=self.weight.shape[-1] // 2)


class UNetBlock(nn.Module):
    def __init__(
        self, in_channels, out_channels, emb, heads=0, up=False, down=False, adaptive=True, scale=1,
        taps=(1, 1), project=False, dropout=0.0, eps=1e-5,
    ):  # fmt: skip
        super().__init__()
        self.in_channels, self.out_channels, self.num_heads = in_channels, out_channels, heads
        self.adaptive_scale, self.skip_scale, self.dropout = adaptive, scale, dropout
        resample = {"up": up, "down": down, "taps": taps}
        self.norm0 = GroupNorm(in_channels, eps)
        self.conv0 = Conv2d(in_channels, out_channels, 3, **resample)
        self.affine = nn.Linear(emb, 2 * out_channels if adaptive else out_channels)
        self.norm1 = GroupNorm(out_channels, eps)
        self.conv1 = Conv2d(out_channels, out_channels, 3)
        self.skip = None
        if in_channels != out_channels or up or down:
            kernel = 1 if project or in_channels != out_channels else 0
            self.skip = Conv2d(in_channels, out_channels, kernel, **resample)
        if heads:
            self.norm2 = GroupNorm(out_channels, eps)
            self.qkv = Conv2d(out_channels, 3 * out_channels, 1)
            self.proj = Conv2d(out_channels, out_channels, 1)

    def forward(self, x, emb):
        skip = x if self.skip is None else self.skip(x)
        x = self.conv0(silu(self.norm0(x)))
        params = self.affine(emb).unsqueeze(2).unsqueeze(3).to(x.dtype)
        if self.adaptive_scale:
            scale, shift = params.chunk(2, dim=1)
            x = silu(torch.addcmul(shift, self.norm1(x), scale + 1))
        else:
            x = silu(self.norm1(x.add_(params)))
        x = self.conv1(F.dropout(x, self.dropout, self.training))
        x = x.add_(skip) * self.skip_scale
        if self.num_heads:
            heads = x.shape[0] * self.num_heads
            q, k, v = self.qkv(self.norm2(x)).reshape(heads, x.shape[1] // self.num_heads, 3, -1).unbind(2)
            a = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
            x = self.proj(a.transpose(1, 2).reshape(x.shape)).add_(x) * self.skip_scale
        return x


class Frequencies(nn.Module):
    def forward(self, sigma):
        angles = sigma[:, None] * torch.exp(-torch.arange(16) / 4)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class UNet(nn.Module):
    """A level of 32 channels and one of 64 with attention. `block` is the class of its blocks."""

    def __init__(self, block=UNetBlock, out_channels=3, **options):
        super().__init__()
        self.map_noise = Frequencies()
        self.map_layer0, self.map_layer1 = nn.Linear(32, 64), nn.Linear(64, 64)
        options = {"emb": 64, **options}
        self.enc = nn.ModuleDict(
            {
                "16_conv": Conv2d(3, 32, 3),
                "16_block": block(32, 32, **options),
                "8_down": block(32, 32, down=True, **options),
                "8_block": block(32, 64, heads=2, **options),
            }
        )
        self.dec = nn.ModuleDict(
            {
                "8_in": block(64, 64, heads=2, **options),
                "8_block0": block(128, 64, **options),
                "8_block1": block(96, 64, heads=1, **options),
                "16_up": block(64, 64, up=True, **options),
                "16_block0": block(96, 32, **options),
                "16_block1": block(64, 32, **options),
            }
        )
        self.out_norm, self.out_conv = GroupNorm(32), Conv2d(32, out_channels, 3)

    def forward(self, x, sigma):
        emb = self.map_noise(sigma).to(self.map_layer0.weight.dtype)
        emb = silu(self.map_layer1(silu(self.map_layer0(emb))))
        skips = []
        for block in self.enc.values():
            x = block(x) if isinstance(block, Conv2d) else block(x, emb)
            skips.append(x)
        for block in self.dec.values():
            x = block(x if x.shape[1] == block.in_channels else torch.cat([x, skips.pop()], dim=1), emb)
        return self.out_conv(silu(self.out_norm(x)))


class AnotherActivation(UNetBlock):
    def forward(self, x, emb):
        scale, shift = self.affine(emb).unsqueeze(2).unsqueeze(3).chunk(2, dim=1)
        h = F.gelu(torch.addcmul(shift, self.norm1(self.conv0(F.gelu(self.norm0(x)))), scale + 1))
        return self.conv1(h) + (x if self.skip is None else self.skip(x))


class AnotherOrder(UNetBlock):
    """A block whose qkv rows are all of q, then all of k, then all of v."""

    def forward(self, x, emb):
        heads, self.num_heads = self.num_heads, 0
        x = super().forward(x, emb)
        self.num_heads = heads
        if heads:
            q, k, v = self.qkv(self.norm2(x)).reshape(x.shape[0], 3, heads, x.shape[1] // heads, -1).unbind(1)
            a = F.scaled_dot_product_attention(q.transpose(2, 3), k.transpose(2, 3), v.transpose(2, 3))
            x = self.proj(a.transpose(2, 3).reshape(x.shape)) + x
        return x


class AnotherTerm(UNetBlock):
    def forward(self, x, emb):
        return super().forward(x, emb) + 1e-3 * emb.mean()


class AnotherSign(UNetBlock):
    """A block with a changed sign that only its results reveal: all names and constants are published."""

    def forward(self, x, emb):
        params = self.affine(emb).unsqueeze(2).unsqueeze(3)
        scale, shift = params.chunk(2, dim=1)
        x1 = self.conv0(silu(self.norm0(x)))
        return self.conv1(silu(torch.addcmul(shift, self.norm1(x1), scale - 1))).add_(
            x if self.skip is None else self.skip(x)
        )


class AnotherEps(UNetBlock):
    """A block whose norms compute with another eps than their attribute says."""

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.norm0.__class__ = self.norm1.__class__ = NormOfFixedEps


class NormOfFixedEps(GroupNorm):
    def forward(self, x):
        return F.group_norm(x, self.num_groups, self.weight, self.bias, 1e-3)
