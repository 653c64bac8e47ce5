"""Networks of another program in the style of diffusers' `UNet2DModel`, written from the formulas.

They are plain modules that use no code of admfast. Tests compare the converted networks with them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from tests.accelerate.client import Upsample as Upsample2D


class Downsample2D(nn.Module):
    def __init__(self, channels, use_conv):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if use_conv else nn.AvgPool2d(2, 2)

    def forward(self, x):
        return self.conv(x)


class ResnetBlock2D(nn.Module):
    def __init__(
        self, in_channels, out_channels, emb, up=False, down=False, scale_shift=False, factor=1.0, eps=1e-5,
        activation=nn.SiLU, groups_out=32,
    ):  # fmt: skip
        super().__init__()
        self.time_embedding_norm = "scale_shift" if scale_shift else "default"
        self.output_scale_factor, self.skip_time_act = factor, False
        self.norm1 = nn.GroupNorm(32, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(emb, 2 * out_channels if scale_shift else out_channels)
        self.norm2 = nn.GroupNorm(groups_out, out_channels, eps=eps)
        self.dropout = nn.Dropout(0.0)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nonlinearity = activation()
        self.upsample = Upsample2D(in_channels, False) if up else None
        self.downsample = Downsample2D(in_channels, False) if down else None
        self.conv_shortcut = None if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, input_tensor, temb):
        h = self.nonlinearity(self.norm1(input_tensor))
        resample = self.upsample if self.upsample is not None else self.downsample
        if resample is not None:
            input_tensor, h = resample(input_tensor), resample(h)
        h = self.conv1(h)
        temb = self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]
        if self.time_embedding_norm == "scale_shift":
            scale, shift = torch.chunk(temb, 2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + temb)
        h = self.conv2(self.dropout(self.nonlinearity(h)))
        skip = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return (skip + h) / self.output_scale_factor


class AttnProcessor2_0:
    def __call__(self, attn, x):
        tokens = x.view(x.shape[0], x.shape[1], -1)
        if attn.group_norm is not None:
            tokens = attn.group_norm(tokens)
        tokens = tokens.transpose(1, 2)
        q, k, v = attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens)
        q = q.view(x.shape[0], -1, attn.heads, q.shape[-1] // attn.heads).transpose(1, 2)
        k = k.view(x.shape[0], -1, attn.heads, k.shape[-1] // attn.heads).transpose(1, 2)
        v = v.view(x.shape[0], -1, attn.heads, v.shape[-1] // attn.heads).transpose(1, 2)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape[0], -1, x.shape[1])
        h = attn.to_out[1](attn.to_out[0](h)).transpose(-1, -2).reshape(x.shape)
        return (h + x if attn.residual_connection else h) / attn.rescale_output_factor


class SharpProcessor(AttnProcessor2_0):
    def __call__(self, attn, x):
        return 2 * super().__call__(attn, x)


class Attention(nn.Module):
    def __init__(self, channels, heads, norm=True, factor=1.0):
        super().__init__()
        self.heads, self.residual_connection, self.rescale_output_factor = heads, True, factor
        self.group_norm = nn.GroupNorm(32, channels) if norm else None
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels), nn.Dropout(0.0)])
        self.processor = AttnProcessor2_0()

    def forward(self, hidden_states, **kwargs):
        return self.processor(self, hidden_states)


class Blocks(nn.Module):
    """Residual blocks, each followed by attention if `heads` is nonzero, then the optional resampler."""

    def __init__(self, sizes, options, heads=0, up=None, down=None):
        super().__init__()
        self.resnets = nn.ModuleList([options["block"](a, b, **options["settings"]) for a, b in sizes])
        width = sizes[-1][1]
        if heads:
            self.attentions = nn.ModuleList([options["attention"](width, heads) for _ in sizes])
        if up is not None:
            self.resamplers = nn.ModuleList([up])
        elif down is not None:
            self.resamplers = nn.ModuleList([down])

    def forward(self, x, temb, skips=None):
        outputs = ()
        for i, resnet in enumerate(self.resnets):
            x = resnet(x if skips is None else torch.cat([x, skips.pop()], dim=1), temb)
            x = self.attentions[i](x, temb=None) if hasattr(self, "attentions") else x
            outputs += (x,)
        for resampler in getattr(self, "resamplers", ()):
            x = resampler(x, temb) if isinstance(resampler, ResnetBlock2D) else resampler(x)
            outputs += (x,)
        return x, outputs


@dataclass
class Output:
    sample: Tensor


class UNet2DModel(nn.Module):
    """A level of 32 channels and one of 64 with attention. `block` and `attention` are the classes to use."""

    def __init__(self, block=ResnetBlock2D, attention=Attention, by_blocks=False, heads=8, **settings):
        super().__init__()
        settings = {"emb": 64, **settings}
        options = {"block": block, "attention": attention, "settings": settings}
        up, down = Upsample2D(64, True), Downsample2D(32, True)
        if by_blocks:
            up, down = block(64, 64, up=True, **settings), block(32, 32, down=True, **settings)
        self.time_embedding = nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 64))
        self.conv_in = nn.Conv2d(3, 32, 3, padding=1)
        self.down_blocks = nn.ModuleList(
            [Blocks([(32, 32)], options, down=down), Blocks([(32, 64)], options, heads)]
        )
        self.mid_block = Blocks([(64, 64), (64, 64)], options, heads)
        self.up_blocks = nn.ModuleList(
            [Blocks([(128, 64), (96, 64)], options, heads, up=up), Blocks([(96, 32), (64, 32)], options)]
        )
        self.conv_norm_out, self.conv_act = nn.GroupNorm(32, 32), nn.SiLU()
        self.conv_out = nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, sample, timestep):
        angles = timestep[:, None] * torch.exp(-torch.arange(16) / 4)
        temb = self.time_embedding(torch.cat([angles.cos(), angles.sin()], dim=1).to(sample.dtype))
        x = self.conv_in(sample)
        skips = [x]
        for block in self.down_blocks:
            x, outputs = block(x, temb)
            skips += outputs
        x, _ = self.mid_block(x, temb)
        for block in self.up_blocks:
            x, _ = block(x, temb, skips)
        return Output(self.conv_out(self.conv_act(self.conv_norm_out(x))))


class AnotherTerm(ResnetBlock2D):
    def forward(self, input_tensor, temb):
        return super().forward(input_tensor, temb) + 1e-3 * temb.mean()


class AnotherSign(ResnetBlock2D):
    """A block with a changed sign that only its results reveal: every name and constant in it is a known one.

    With one channel per group the results are equal too, because the norm removes a constant of a channel.
    """

    def forward(self, input_tensor, temb):
        h = self.conv1(self.nonlinearity(self.norm1(input_tensor)))
        h = self.norm2(h - self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None])
        skip = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return skip + self.conv2(self.dropout(self.nonlinearity(h)))


class LowRankConv2d(nn.Conv2d):
    """A convolution with a second branch, like the layers that low-rank adapters insert."""

    def forward(self, x):
        return super().forward(x) + super().forward(x).mean()


class WithAdapters(ResnetBlock2D):
    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.conv2.__class__ = LowRankConv2d
