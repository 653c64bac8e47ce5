"""The noisy-image classifier that guides ADM-G: the down half of a UNet with one of four pools."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from admfast.models.body import (
    build_down_path,
    build_middle_block,
    build_time_mlp,
    check_input,
    convert_convolutions,
    first_parameter_dtype,
)
from admfast.models.config import ClassifierConfig
from admfast.models.convolution import conv_nd
from admfast.models.fold import FoldableNet, ProjectedEmbedding
from admfast.models.layers import (
    AttentionPool2d,
    Head,
    Norm,
    call_block,
    call_head,
    timestep_embedding,
    zero_parameters,
)

HIDDEN_WIDTH = 2048  # width of the hidden layer of the spatial pools


class Classifier(FoldableNet):
    """Network from a noisy image to class logits (Dhariwal & Nichol 2021, section 4).

    Parameters are named as in the released checkpoints.

    Pools: "adaptive" (GN, SiLU, mean, 1x1 convolution), "attention" (GN, SiLU, attention pool), "spatial" and
    "spatial_v2" (means of every block's output, concatenated, through a two-layer perceptron).
    """

    num_passes = 2  # guidance needs the gradient with respect to x

    def __init__(self, config: ClassifierConfig):
        super().__init__()
        self.config = config
        self.time_embed = build_time_mlp(config.model_channels)
        self.input_blocks, outputs = build_down_path(config, config.in_channels)
        self.middle_block = build_middle_block(config)
        channels = config.widths()[-1]
        self.out = _head(config, channels, feature_size=sum(outputs) + channels)
        self._assign_projection_columns()

    def forward(self, x: Tensor, timesteps: Tensor, projected: Tensor | None = None) -> Tensor:
        """Return logits [N, classes] (dtype of x) at x [N, C, *spatial] and timesteps [N]; differentiable.

        projected: see `UNet.forward`. Raises InvalidArgument for shapes that don't fit.
        """
        config = self.config
        check_input(config, config.in_channels, x, timesteps)
        emb = self.embed_conditions(timesteps) if projected is None else ProjectedEmbedding(projected)
        pools_every_block, head_dtype = (
            config.pool.startswith("spatial"),
            first_parameter_dtype(self.out, x.dtype),
        )
        means = []
        h = self.enter_torso(x)
        for block in self.input_blocks:
            h = call_block(block, h, emb)
            if pools_every_block:
                means.append(h.to(head_dtype).flatten(2).mean(dim=2))
        h = call_block(self.middle_block, h, emb)
        if pools_every_block:
            means.append(h.to(head_dtype).flatten(2).mean(dim=2))
            h = torch.cat(means, dim=1)
        return call_head(self.out, h, head_dtype).to(x.dtype)

    def embed_conditions(self, timesteps: Tensor) -> Tensor | ProjectedEmbedding:
        """Return the embedding of timesteps [N] that the blocks get: [N, E], or its joined projections."""
        emb = timestep_embedding(timesteps, self.config.model_channels)
        return self.project_embedding(
            self.time_embed(emb.to(first_parameter_dtype(self.time_embed, emb.dtype)))
        )

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
            zero_parameters(conv_nd(config.dims, channels, config.out_channels, 1)),
            nn.Flatten(),
        )
    if config.pool == "attention":
        side = config.image_size // config.pool_downsampling()
        return Head(
            Norm(channels),
            nn.SiLU(),
            AttentionPool2d(side, channels, config.num_head_channels, config.out_channels),
        )
    if config.pool == "spatial":
        return nn.Sequential(
            nn.Linear(feature_size, HIDDEN_WIDTH), nn.ReLU(), nn.Linear(HIDDEN_WIDTH, config.out_channels)
        )
    return nn.Sequential(
        nn.Linear(feature_size, HIDDEN_WIDTH),
        _NormOfFeatures(HIDDEN_WIDTH),
        nn.SiLU(),
        nn.Linear(HIDDEN_WIDTH, config.out_channels),
    )
