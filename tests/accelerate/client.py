"""Networks of another program that use the published names, like those that `accelerate` has to convert.

They are plain modules that use no code of admfast. Tests compare the converted networks with them.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def timestep_embedding(timesteps, dim, max_period=10000):
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32)
    angles = timesteps[:, None].float() * torch.exp(-math.log(max_period) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class GroupNorm32(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x.float()).type(x.dtype)


class SiLU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


class TimestepBlock(nn.Module):
    pass


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    def forward(self, x, emb):
        for layer in self:
            x = layer(x, emb) if isinstance(layer, TimestepBlock) else layer(x)
        return x


class Upsample(nn.Module):
    def __init__(self, channels, use_conv):
        super().__init__()
        self.use_conv = use_conv
        if use_conv:
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return self.conv(x) if self.use_conv else x


class Downsample(nn.Module):
    def __init__(self, channels, use_conv):
        super().__init__()
        self.use_conv = use_conv
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if use_conv else nn.AvgPool2d(2)

    def forward(self, x):
        return self.op(x)


class ResBlock(TimestepBlock):
    def __init__(self, channels, emb, out, dropout=0.0, scale_shift=True, resample=None, silu=SiLU):
        super().__init__()
        self.use_scale_shift_norm, self.use_checkpoint, self.updown = scale_shift, False, bool(resample)
        self.in_layers = nn.Sequential(
            GroupNorm32(32, channels), silu(), nn.Conv2d(channels, out, 3, padding=1)
        )
        kind = {"up": Upsample, "down": Downsample}.get(resample)
        self.h_upd = kind(channels, False) if kind else nn.Identity()
        self.x_upd = kind(channels, False) if kind else nn.Identity()
        self.emb_layers = nn.Sequential(silu(), nn.Linear(emb, 2 * out if scale_shift else out))
        self.out_layers = nn.Sequential(
            GroupNorm32(32, out), silu(), nn.Dropout(p=dropout), nn.Conv2d(out, out, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if out == channels else nn.Conv2d(channels, out, 1)

    def forward(self, x, emb):
        return self._forward(x, emb)

    def _forward(self, x, emb):
        if self.updown:
            h = self.in_layers[-1](self.h_upd(self.in_layers[:-1](x)))
            x = self.x_upd(x)
        else:
            h = self.in_layers(x)
        added = self.emb_layers(emb).type(h.dtype)[:, :, None, None]
        if self.use_scale_shift_norm:
            scale, shift = torch.chunk(added, 2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + added)
        return self.skip_connection(x) + h


class QKVAttention(nn.Module):
    """Attention with qkv rows grouped by head (`legacy`), or as all of q, then all of k, then all of v."""

    def __init__(self, n_heads, legacy):
        super().__init__()
        self.n_heads, self.legacy = n_heads, legacy

    def forward(self, qkv):
        n, width, length = qkv.shape
        size = width // (3 * self.n_heads)
        if self.legacy:
            q, k, v = qkv.reshape(n * self.n_heads, 3 * size, length).split(size, dim=1)
        else:
            q, k, v = (part.reshape(n * self.n_heads, size, length) for part in qkv.chunk(3, dim=1))
        weight = torch.einsum("bct,bcs->bts", q, k) / math.sqrt(size)
        return torch.einsum("bts,bcs->bct", weight.softmax(dim=-1), v).reshape(n, -1, length)


class AttentionBlock(nn.Module):
    def __init__(self, channels, num_heads, legacy):
        super().__init__()
        self.num_heads, self.use_checkpoint = num_heads, False
        self.norm = GroupNorm32(32, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.attention = QKVAttention(num_heads, legacy)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x):
        flat = x.reshape(*x.shape[:2], -1)
        return (flat + self.proj_out(self.attention(self.qkv(self.norm(flat))))).reshape(x.shape)


class Parts(nn.Module):
    """The layers that a UNet and a classifier share: a level of 32 channels and one of 64 with attention."""

    def __init__(self, in_channels=3, legacy=True, dropout=0.0, resample_blocks=True, scale_shift=True):
        super().__init__()
        self.model_channels, self.dtype = 32, torch.float32
        self.time_embed = nn.Sequential(nn.Linear(32, 128), nn.SiLU(), nn.Linear(128, 128))

        def block(channels, out, resample=None):
            return ResBlock(channels, 128, out, dropout, scale_shift, resample)

        halving = block(32, 32, "down") if resample_blocks else Downsample(32, True)
        self.input_blocks = nn.ModuleList(
            [
                TimestepEmbedSequential(nn.Conv2d(in_channels, 32, 3, padding=1)),
                TimestepEmbedSequential(block(32, 32)),
                TimestepEmbedSequential(halving),
                TimestepEmbedSequential(block(32, 64), AttentionBlock(64, 2, legacy)),
            ]
        )
        self.middle_block = TimestepEmbedSequential(
            block(64, 64), AttentionBlock(64, 2, legacy), block(64, 64)
        )
        self._block, self._doubling = block, block(64, 64, "up") if resample_blocks else Upsample(64, True)


class UNetModel(Parts):
    def __init__(self, num_classes=None, legacy=True, **options):
        super().__init__(legacy=legacy, **options)
        self.num_classes = num_classes
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, 128)
        block, doubling = self._block, self._doubling
        del self._block, self._doubling
        self.output_blocks = nn.ModuleList(
            [
                TimestepEmbedSequential(block(128, 64), AttentionBlock(64, 2, legacy)),
                TimestepEmbedSequential(block(96, 64), AttentionBlock(64, 2, legacy), doubling),
                TimestepEmbedSequential(block(96, 32)),
                TimestepEmbedSequential(block(64, 32)),
            ]
        )
        self.out = nn.Sequential(GroupNorm32(32, 32), nn.SiLU(), nn.Conv2d(32, 6, 3, padding=1))

    def forward(self, x, timesteps, y=None):
        assert (y is not None) == (self.num_classes is not None)
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels))
        if self.num_classes is not None:
            emb = emb + self.label_emb(y)
        h, hs = x.type(self.dtype), []
        for module in self.input_blocks:
            h = module(h, emb)
            hs.append(h)
        h = self.middle_block(h, emb)
        for module in self.output_blocks:
            h = module(torch.cat([h, hs.pop()], dim=1), emb)
        return self.out(h.type(x.dtype))


class SuperResModel(UNetModel):
    def __init__(self, **options):
        super().__init__(in_channels=6, **options)

    def forward(self, x, timesteps, low_res=None, **kwargs):
        upsampled = F.interpolate(low_res, x.shape[2:], mode="bilinear")
        return super().forward(torch.cat([x, upsampled], dim=1), timesteps, **kwargs)


class EncoderUNetModel(Parts):
    def __init__(self, pool="adaptive", **options):
        super().__init__(**options)
        del self._block, self._doubling
        self.pool = pool
        if pool == "adaptive":
            self.out = nn.Sequential(
                GroupNorm32(32, 64),
                nn.SiLU(),
                nn.AdaptiveAvgPool2d((1, 1)),
                nn.Conv2d(64, 5, 1),
                nn.Flatten(),
            )
        else:
            self.out = nn.Sequential(nn.Linear(32 + 32 + 32 + 64 + 64, 16), nn.ReLU(), nn.Linear(16, 5))

    def forward(self, x, timesteps):
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels))
        results = []
        h = x.type(self.dtype)
        for module in self.input_blocks:
            h = module(h, emb)
            if self.pool.startswith("spatial"):
                results.append(h.type(x.dtype).mean(dim=(2, 3)))
        h = self.middle_block(h, emb)
        if self.pool.startswith("spatial"):
            results.append(h.type(x.dtype).mean(dim=(2, 3)))
            return self.out(torch.cat(results, axis=-1))
        return self.out(h.type(x.dtype))


class WithUnusedArguments(UNetModel):
    def forward(self, x, timesteps, y=None, ref_img=None, **kwargs):
        assert (y is not None) == (self.num_classes is not None)
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels))
        if self.num_classes is not None:
            emb = emb + self.label_emb(y)
        hs = []
        h = x
        for module in self.input_blocks:
            h = module(h, emb)
            hs.append(h)
        h = self.middle_block(h, emb)
        for module in self.output_blocks:
            h = torch.cat([h, hs.pop()], dim=1)
            h = module(h, emb)
        return self.out(h)


class WithAnotherForward(UNetModel):
    """A UNet that halves the embedding: its `forward` has one constant more than the published one."""

    def forward(self, x, timesteps, y=None):
        emb = 0.5 * self.time_embed(timestep_embedding(timesteps, self.model_channels))
        hs = []
        h = x
        for module in self.input_blocks:
            h = module(h, emb)
            hs.append(h)
        h = self.middle_block(h, emb)
        for module in self.output_blocks:
            h = module(torch.cat([h, hs.pop()], dim=1), emb)
        return self.out(h)


class WithUsedArgument(UNetModel):
    def forward(self, x, timesteps, y=None, gt=None):
        x = x if gt is None else x + gt
        return super().forward(x, timesteps, y)


class OtherBlock(ResBlock):
    """A residual block that subtracts its branch from the skip instead of adding it."""

    def _forward(self, x, emb):
        return 2 * self.skip_connection(x) - super()._forward(x, emb)


class WithOtherBlocks(UNetModel):
    def __init__(self, **options):
        super().__init__(**options)
        self.middle_block[0] = OtherBlock(64, 128, 64)


class Wrapper(nn.Module):
    """A denoiser that holds the network as `backbone`."""

    def __init__(self, net):
        super().__init__()
        self.backbone = net

    def forward(self, x, t):
        return self.backbone(x, t)[:, :3]


def filled(net, seed=0):
    """Fill the parameters with nonzero random values and return the network in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return net.eval()


class WithBlockUsedTwice(UNetModel):
    def __init__(self, **options):
        super().__init__(**options)
        self.middle_block[2] = self.middle_block[0]


class WithOptionalLabels(UNetModel):
    def forward(self, x, timesteps, y=None):
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels))
        if y is not None:
            emb = emb + self.label_emb(y)
        hs = []
        h = x
        for module in self.input_blocks:
            h = module(h, emb)
            hs.append(h)
        h = self.middle_block(h, emb)
        for module in self.output_blocks:
            h = module(torch.cat([h, hs.pop()], dim=1), emb)
        return self.out(h)
