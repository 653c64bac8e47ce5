"""diffusers' `UNet2DModel` in plain PyTorch, from its configuration and state dict.

It has the options that an exported network can have. If diffusers is installed, tests compare with it too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class PlainUNet2D:
    """The network, called with images [N, C, H, W], timesteps [N] and classes [N] or None."""

    config: Mapping[str, Any]
    state: Mapping[str, Tensor]

    def __call__(self, x: Tensor, t: Tensor, classes: Tensor | None = None) -> Tensor:
        emb = self.embedding(t, classes)
        h = self.conv("conv_in", x)
        skips = [h]
        for level, kind in enumerate(self.config["down_block_types"]):
            for i in range(self.config["layers_per_block"]):
                h = self.layer(f"down_blocks.{level}", i, kind, h, emb)
                skips.append(h)
            if level + 1 < len(self.config["down_block_types"]):
                h = self.down(f"down_blocks.{level}.downsamplers.0", kind, h, emb)
                skips.append(h)
        h = self.residual("mid_block.resnets.0", h, emb)
        h = self.attention("mid_block.attentions.0", h)
        h = self.residual("mid_block.resnets.1", h, emb)
        for level, kind in enumerate(self.config["up_block_types"]):
            for i in range(self.config["layers_per_block"] + 1):
                h = self.layer(f"up_blocks.{level}", i, kind, torch.cat([h, skips.pop()], 1), emb)
            if level + 1 < len(self.config["up_block_types"]):
                h = self.up(f"up_blocks.{level}.upsamplers.0", kind, h, emb)
        return self.conv("conv_out", F.silu(self.norm("conv_norm_out", h)))

    def embedding(self, t: Tensor, classes: Tensor | None) -> Tensor:
        assert self.config["flip_sin_to_cos"] and self.config["freq_shift"] == 0
        half = self.config["block_out_channels"][0] // 2
        angles = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(half) / half)
        waves = torch.cat([angles.cos(), angles.sin()], 1).to(self.state["conv_in.weight"].dtype)
        emb = self.linear("time_embedding.linear_2", F.silu(self.linear("time_embedding.linear_1", waves)))
        return emb if classes is None else emb + self.state["class_embedding.weight"][classes]

    def layer(self, block: str, i: int, kind: str, h: Tensor, emb: Tensor) -> Tensor:
        h = self.residual(f"{block}.resnets.{i}", h, emb)
        return self.attention(f"{block}.attentions.{i}", h) if kind.startswith("Attn") else h

    def down(self, name: str, kind: str, h: Tensor, emb: Tensor) -> Tensor:
        if kind.startswith("Resnet") or (
            kind.startswith("Attn") and self.config["downsample_type"] == "resnet"
        ):
            return self.residual(name, h, emb, lambda x: F.avg_pool2d(x, 2))
        return self.conv(f"{name}.conv", h, stride=2)

    def up(self, name: str, kind: str, h: Tensor, emb: Tensor) -> Tensor:
        if kind.startswith("Resnet") or (
            kind.startswith("Attn") and self.config["upsample_type"] == "resnet"
        ):
            return self.residual(name, h, emb, lambda x: F.interpolate(x, scale_factor=2.0))
        return self.conv(f"{name}.conv", F.interpolate(h, scale_factor=2.0))

    def residual(
        self, name: str, x: Tensor, emb: Tensor, resampled: Callable[[Tensor], Tensor] = lambda x: x
    ) -> Tensor:
        h = self.conv(f"{name}.conv1", resampled(F.silu(self.norm(f"{name}.norm1", x))))
        added = self.linear(f"{name}.time_emb_proj", F.silu(emb))[:, :, None, None]
        if self.config["resnet_time_scale_shift"] == "scale_shift":
            scale, shift = added.chunk(2, dim=1)
            h = self.norm(f"{name}.norm2", h) * (1 + scale) + shift
        else:
            h = self.norm(f"{name}.norm2", h + added)
        h = self.conv(f"{name}.conv2", F.silu(h))
        x = resampled(x)
        return h + (
            self.conv(f"{name}.conv_shortcut", x) if f"{name}.conv_shortcut.weight" in self.state else x
        )

    def attention(self, name: str, x: Tensor) -> Tensor:
        tokens = self.norm(f"{name}.group_norm", x).flatten(2).mT  # [N, S, C]
        dim = self.config["attention_head_dim"] or x.shape[1]
        q, k, v = (
            self.linear(f"{name}.to_{part}", tokens).unflatten(2, (-1, dim)).transpose(1, 2) for part in "qkv"
        )
        h = torch.softmax(q @ k.mT / math.sqrt(dim), dim=-1) @ v  # [N, heads, S, dim]
        out = self.linear(f"{name}.to_out.0", h.transpose(1, 2).flatten(2))
        return x + out.mT.reshape(x.shape)

    def norm(self, name: str, x: Tensor) -> Tensor:
        groups, eps = self.config["norm_num_groups"], self.config["norm_eps"]
        return F.group_norm(x, groups, self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.state[f"{name}.weight"]
        return F.conv2d(x, weight, self.state[f"{name}.bias"], stride, weight.shape[-1] // 2)
