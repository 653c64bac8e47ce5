"""The noisy-image classifier that guides ADM-G: the down half of a UNet with one of four pools."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from admfast.models.body import (
    check_input,
    convert_convolutions,
    down_path,
    dtype_of,
    middle_block,
    time_mlp,
)
from admfast.models.config import ClassifierConfig
from admfast.models.convolution import conv_nd
from admfast.models.fold import FoldableNet, Projected
from admfast.models.layers import (
    AttentionPool2d,
    Head,
    Norm,
    call_block,
    call_head,
    timestep_embedding,
    zeroed,
)

HIDDEN = 2048  # width of the hidden layer of the spatial pools


class Classifier(FoldableNet):
    """Network from a noisy image to class logits (Dhariwal & Nichol 2021, section 4).

    Parameters are named as in the released checkpoints.

    Pools: "adaptive" (GN, SiLU, mean, 1x1 convolution), "attention" (GN, SiLU, attention pool), "spatial" and
    "spatial_v2" (means of every block's output, concatenated, through a two-layer perceptron).
    """

    directions = 2  # guidance needs the gradient with respect to x

    def __init__(self, config: ClassifierConfig):
        super().__init__()
        self.config = config
        self.time_embed = time_mlp(config.model_channels)
        self.input_blocks, outputs = down_path(config, config.in_channels)
        self.middle_block = middle_block(config)
        channels = config.widths()[-1]
        self.out = _head(config, channels, feature_size=sum(outputs) + channels)
        self._lay_out_projections()

    def forward(self, x: Tensor, timesteps: Tensor, projected: Tensor | None = None) -> Tensor:
        """Return logits [N, classes] (dtype of x) at x [N, C, *spatial] and timesteps [N]; differentiable.

        projected: see `UNet.forward`. Raises InvalidArgument for shapes that don't fit.
        """
        config = self.config
        check_input(config, config.in_channels, x, timesteps)
        emb = self.embedded(timesteps) if projected is None else Projected(projected)
        spatial, wide = config.pool.startswith("spatial"), dtype_of(self.out, x.dtype)
        means = []
        h = self.entering(x)
        for block in self.input_blocks:
            h = call_block(block, h, emb)
            if spatial:
                means.append(h.to(wide).flatten(2).mean(dim=2))
        h = call_block(self.middle_block, h, emb)
        if spatial:
            means.append(h.to(wide).flatten(2).mean(dim=2))
            h = torch.cat(means, dim=1)
        return call_head(self.out, h, wide).to(x.dtype)

    def embedded(self, timesteps: Tensor) -> Tensor | Projected:
        """Return the embedding of timesteps [N] that the blocks get: [N, E], or its joined projections."""
        emb = timestep_embedding(timesteps, self.config.model_channels)
        return self.projected(self.time_embed(emb.to(dtype_of(self.time_embed, emb.dtype))))

    def convert_torso(self, dtype: torch.dtype) -> Self:
        """Run the input and middle blocks in `dtype`: cast their convolutions, in place.

        This is the published recipe for half precision.
        """
        convert_convolutions((self.input_blocks, self.middle_block), dtype)
        return self


class _NormOfFeatures(Norm):
    """A `Norm` of feature vectors [N, C]."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x[:, :, None])[:, :, 0]


def _head(config: ClassifierConfig, channels: int, feature_size: int) -> nn.Sequential:
    """Return the pool and the layers after it, at the published positions, which name the parameters."""
    if config.pool == "adaptive":
        return Head(
            Norm(channels),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d((1, 1)),
            zeroed(conv_nd(config.dims, channels, config.out_channels, 1)),
            nn.Flatten(),
        )
    if config.pool == "attention":
        side = config.image_size // config.pool_ds()
        return Head(
            Norm(channels),
            nn.SiLU(),
            AttentionPool2d(side, channels, config.num_head_channels, config.out_channels),
        )
    if config.pool == "spatial":
        return nn.Sequential(
            nn.Linear(feature_size, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, config.out_channels)
        )
    return nn.Sequential(
        nn.Linear(feature_size, HIDDEN),
        _NormOfFeatures(HIDDEN),
        nn.SiLU(),
        nn.Linear(HIDDEN, config.out_channels),
    )
