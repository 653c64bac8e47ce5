"""The ADM diffusion UNet."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from admfast.errors import invalid
from admfast.models.body import (
    build_attention_block,
    build_down_path,
    build_middle_block,
    build_res_block,
    build_time_mlp,
    check_input,
    convert_convolutions,
    first_parameter_dtype,
)
from admfast.models.config import UNetConfig
from admfast.models.convolution import conv_nd
from admfast.models.fold import FoldableNet, ProjectedEmbedding
from admfast.models.layers import (
    Head,
    Norm,
    TimestepEmbedSequential,
    Upsample,
    call_block,
    call_head,
    timestep_embedding,
    zero_parameters,
)


class UNet(FoldableNet):
    """The UNet of "Diffusion Models Beat GANs on Image Synthesis" (Dhariwal & Nichol 2021, section 3).

    Parameters have the names, shapes and meaning of the released checkpoints. `config` determines the whole
    architecture.
    """

    input_copies = 1

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        emb_channels = 4 * config.model_channels
        self.time_embed = build_time_mlp(config.model_channels)
        if config.num_classes is not None:
            self.label_emb = nn.Embedding(config.num_classes, emb_channels)
        self.input_blocks, skip_channels = build_down_path(config, config.in_channels * self.input_copies)
        self.middle_block = build_middle_block(config)
        self.output_blocks = _up_path(config, skip_channels)
        first = config.widths()[0]
        self.out = Head(
            Norm(first),
            nn.SiLU(),
            zero_parameters(conv_nd(config.dims, first, config.out_channels, 3, padding=1)),
        )
        self._assign_projection_columns()

    def forward(
        self, x: Tensor, timesteps: Tensor, y: Tensor | None = None, projected: Tensor | None = None
    ) -> Tensor:
        """Return the output at `x`: the mean channels, then the variance channels if the variance is learned.

        Args:
            x: [N, C, *spatial], float; sides divisible by 2^(levels - 1), except a volume's first side.
            timesteps: [N], integer or float, in the unit of the original schedule.
            y: [N] class indices for a class-conditional network; None otherwise.
            projected: [N, projected_width], `join_projections(embed_conditions(timesteps, y))`. If it is
                given, the values of timesteps and y are ignored.

        Returns:
            [N, out_channels, *spatial], dtype of `x`. Differentiable in x and in the parameters.

        Raises:
            InvalidArgument: for labels that are missing or not accepted, or shapes that don't fit.
        """
        config = self.config
        check_input(config, config.in_channels * self.input_copies, x, timesteps)
        units = config.side_divisors()
        if any(side % unit for side, unit in zip(x.shape[2:], units, strict=True)):
            raise invalid("x.shape", tuple(x.shape), f"sides that {units[-1]} divides")
        emb = self.embed_conditions(timesteps, y) if projected is None else ProjectedEmbedding(projected)
        h = run_blocks(self, self.enter_torso(x), emb)
        return call_head(self.out, h, first_parameter_dtype(self.out, x.dtype)).to(x.dtype)

    def embed_conditions(self, timesteps: Tensor, y: Tensor | None = None) -> Tensor | ProjectedEmbedding:
        """Return the embedding of timesteps and classes [N] for the blocks, or its joined projections."""
        config = self.config
        if (y is not None) != (config.num_classes is not None):
            requirement = "needs" if config.num_classes is not None else "takes no"
            raise invalid("y", None if y is None else "given", f"this network {requirement} class labels")
        if y is not None:
            self._check_labels(y, timesteps)
        emb = timestep_embedding(timesteps, config.model_channels)
        emb = self.time_embed(emb.to(first_parameter_dtype(self.time_embed, emb.dtype)))
        return self.project_embedding(emb if y is None else emb + self._embedded(y))

    def _check_labels(self, y: object, timesteps: Tensor) -> None:
        """Raise InvalidArgument for labels that aren't one whole number for each image."""
        if not isinstance(y, Tensor) or y.dtype not in (torch.int64, torch.int32):
            kind = str(y.dtype) if isinstance(y, Tensor) else type(y).__name__
            raise invalid("y", kind, "a tensor of class indices, int64")
        if y.shape != timesteps.shape:
            raise invalid("y.shape", tuple(y.shape), f"one class for each image, {tuple(timesteps.shape)}")

    def _embedded(self, y: Tensor) -> Tensor:
        """Return the embeddings of classes; on the CPU, the lookup detects invalid ones at no cost."""
        try:
            return self.label_emb(y)
        except IndexError:
            raise invalid("y", y.tolist(), f"0 to {self.label_emb.num_embeddings - 1}") from None

    def convert_torso(self, dtype: torch.dtype) -> Self:
        """Run the input, middle and output blocks in `dtype`: cast their convolutions, in place.

        This is the published recipe for half precision: embeddings, norms and the final `out` keep their
        dtype. Converting back to float32 gives the rounded weights, not the original ones.
        """
        convert_convolutions((self.input_blocks, self.middle_block, self.output_blocks), dtype)
        return self


def run_blocks(net: Any, h: Tensor, emb: Tensor | ProjectedEmbedding) -> Tensor:
    """Run the input blocks, the middle block and, if the network has any, the output blocks."""
    outputs, skips = getattr(net, "output_blocks", ()), []
    for block in net.input_blocks:
        h = call_block(block, h, emb)
        if outputs:
            skips.append(h)
    h = call_block(net.middle_block, h, emb)
    for block in outputs:
        h = call_block(block, h, emb, skips.pop())
    return h


def _up_path(config: UNetConfig, skip_channels: list[int]) -> nn.ModuleList:
    """Return the output blocks: per level one more than the down path has; each gets one of its skips."""
    skip_channels = list(skip_channels)
    widths, has_attention = config.widths(), config.levels_with_attention()
    blocks = nn.ModuleList()
    channels = widths[-1]
    for level in reversed(range(len(widths))):
        for index in range(config.num_res_blocks + 1):
            block = build_res_block(config, channels + skip_channels.pop(), widths[level])
            if not isinstance(block.skip_connection, nn.Identity):
                block.skip_connection.split = channels  # type: ignore[assignment]
            layers: list[nn.Module] = [block]
            channels = widths[level]
            if has_attention[level]:
                layers.append(build_attention_block(config, channels, up_path=True))
            if level and index == config.num_res_blocks:
                layers.append(
                    build_res_block(config, channels, channels, up=True)
                    if config.resblock_updown
                    else Upsample(channels, config.conv_resample, dims=config.dims)
                )
            blocks.append(TimestepEmbedSequential(*layers))
    return blocks
