"""Parts that the UNet and the classifier share: time MLP, down path, middle block, half precision."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from admfast.errors import invalid
from admfast.models.config import NetConfig
from admfast.models.convolution import conv_nd
from admfast.models.layers import AttentionBlock, Downsample, ResBlock, TimestepEmbedSequential


def build_time_mlp(model_channels: int) -> nn.Sequential:
    """Return Linear, SiLU, Linear: sinusoidal embedding [N, model_channels] -> [N, 4 model_channels]."""
    width = 4 * model_channels
    return nn.Sequential(nn.Linear(model_channels, width), nn.SiLU(), nn.Linear(width, width))


def build_down_path(config: NetConfig, in_channels: int) -> tuple[nn.ModuleList, list[int]]:
    """Return the input blocks (stem first), and the number of output channels of each."""
    widths, has_attention = config.widths(), config.levels_with_attention()
    channels = widths[0]
    blocks = nn.ModuleList(
        [TimestepEmbedSequential(conv_nd(config.dims, in_channels, channels, 3, padding=1))]
    )
    outputs = [channels]
    for level, width in enumerate(widths):
        for _ in range(config.num_res_blocks):
            layers: list[nn.Module] = [build_res_block(config, channels, width)]
            channels = width
            if has_attention[level]:
                layers.append(build_attention_block(config, channels))
            blocks.append(TimestepEmbedSequential(*layers))
            outputs.append(channels)
        if level != len(widths) - 1:
            blocks.append(TimestepEmbedSequential(_down_block(config, channels)))
            outputs.append(channels)
    return blocks, outputs


def build_middle_block(config: NetConfig) -> TimestepEmbedSequential:
    """Return residual block, attention (always), residual block, at the lowest resolution."""
    channels = config.widths()[-1]
    return TimestepEmbedSequential(
        build_res_block(config, channels, channels),
        build_attention_block(config, channels),
        build_res_block(config, channels, channels),
    )


def check_input(config: NetConfig, channels: int, x: Tensor, timesteps: Tensor) -> None:
    """Raise InvalidArgument unless images are [N, channels, *spatial] and timesteps are [N]."""
    if x.dim() != config.dims + 2 or x.shape[1] != channels:
        allowed = f"[N, {channels}, ...] with {config.dims} spatial dimensions"
        raise invalid("x.shape", tuple(x.shape), allowed)
    if timesteps.shape != x.shape[:1]:
        raise invalid("timesteps.shape", tuple(timesteps.shape), f"one for each image, ({x.shape[0]},)")


def first_parameter_dtype(blocks: nn.Module, default: torch.dtype) -> torch.dtype:
    """Return the dtype in which `blocks` compute: that of their first parameter, else `default`."""
    return next((parameter.dtype for parameter in blocks.parameters()), default)


def convert_convolutions(modules: Iterable[nn.Module], dtype: torch.dtype) -> None:
    """Cast the weights and biases of every convolution in `modules` to `dtype`, in place."""
    for part in modules:
        for module in part.modules():
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
                module.to(dtype)


def build_res_block(
    config: NetConfig, channels: int, out_channels: int, up: bool = False, down: bool = False
) -> ResBlock:
    """Return a residual block with the options of `config`."""
    return ResBlock(
        channels,
        4 * config.model_channels,
        config.dropout,
        out_channels=out_channels,
        use_scale_shift_norm=config.use_scale_shift_norm,
        dims=config.dims,
        use_checkpoint=config.use_checkpoint,
        up=up,
        down=down,
    )


def build_attention_block(config: NetConfig, channels: int, up_path: bool = False) -> AttentionBlock:
    """Return an attention block with the options of `config`."""
    heads = config.heads(channels, up_path)
    return AttentionBlock(
        channels,
        heads,
        use_new_attention_order=config.use_new_attention_order,
        use_checkpoint=config.use_checkpoint,
    )


def _down_block(config: NetConfig, channels: int) -> nn.Module:
    """Return the layer that halves the resolution after a level of the down path."""
    if config.resblock_updown:
        return build_res_block(config, channels, channels, down=True)
    return Downsample(channels, config.conv_resample, dims=config.dims)
