"""Networks and blocks under the names of the published `unet.py`.

The networks have the published arguments, initial weights and attributes. They run on admfast's blocks, which
fold their weights in evaluation mode. The blocks, such as `ResBlock`, have admfast's constructors.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from admfast.accelerate.forward_methods import ForwardMethod
from admfast.accelerate.networks import AcceleratedNet
from admfast.compat.guided_diffusion.fp16_util import convert_module_to_f16, convert_module_to_f32
from admfast.compat.guided_diffusion.nn import (
    avg_pool_nd,
    checkpoint,
    conv_nd,
    linear,
    normalization,
    timestep_embedding,
    zero_module,
)
from admfast.engine.engine import Engine
from admfast.engine.precision import Policy
from admfast.models import (
    Classifier,
    ClassifierConfig,
    NetConfig,
    UNet,
    UNetConfig,
    Upsampler,
    UpsamplerConfig,
)
from admfast.models.config import Pool
from admfast.models.layers import (
    AttentionBlock,
    AttentionPool2d,
    Downsample,
    ResBlock,
    TimestepBlock,
    TimestepEmbedSequential,
    Upsample,
)

__all__ = [
    "AttentionBlock",
    "AttentionPool2d",
    "Downsample",
    "EncoderUNetModel",
    "ResBlock",
    "SuperResModel",
    "TimestepBlock",
    "TimestepEmbedSequential",
    "UNetModel",
    "Upsample",
    "avg_pool_nd",
    "checkpoint",
    "conv_nd",
    "convert_module_to_f16",
    "convert_module_to_f32",
    "linear",
    "normalization",
    "timestep_embedding",
    "zero_module",
]

_CONFIG_ATTRIBUTES = (
    "image_size", "model_channels", "out_channels", "num_res_blocks", "attention_resolutions", "dropout",
    "channel_mult", "conv_resample", "use_checkpoint", "num_heads", "num_head_channels",
)  # fmt: skip


class _PublishedNet(AcceleratedNet):
    """Base class of the published networks: attributes, conversions, and the engine of sampling loops."""

    config: Any
    _fold_engine: Engine | None = None  # named `_fold_*` because copies and pickles leave those out

    def _set_published_attributes(self, config: NetConfig, use_fp16: bool) -> None:
        """Set the attributes that the published constructor sets."""
        for name in _CONFIG_ATTRIBUTES:
            setattr(self, name, getattr(config, name))
        self.num_heads_upsample = config.heads_upsample()
        self.dtype = torch.float16 if use_fp16 else torch.float32
        self._feature_size = _feature_size(config)

    def convert_to_fp16(self) -> None:
        """Round the torso's convolutions to float16 in place; they then compute in float16."""
        self.convert_torso(torch.float16)  # type: ignore[operator]

    def convert_to_fp32(self) -> None:
        """Make the torso's convolutions float32 again in place; their values stay rounded."""
        self.convert_torso(torch.float32)  # type: ignore[operator]

    def engine_with(self, classifier: _PublishedNet | None) -> Engine:
        """Return the engine of this network and a classifier; the last one is cached."""
        policy = Policy("as called", _torso(self), _torso(classifier or self))
        engine = self._fold_engine
        if engine is None or engine.classifier is not classifier or engine.policy != policy:
            engine = self._fold_engine = Engine(self, classifier, policy)
        return engine


def _torso(net: _PublishedNet) -> torch.dtype:
    """Return the dtype in which a network's torso computes when it is called."""
    policy = net.accelerated_policy
    return net._parameter_dtype() if policy is None else policy.torso


class UNetModel(_PublishedNet, UNet):
    """The published UNet, with the published arguments, attributes and initial weights.

    attention_resolutions: downsampling factors. use_fp16: only sets `dtype`; `convert_to_fp16` converts the
    weights. Raises: InvalidArgument.
    """

    accelerated_forward = ForwardMethod(
        "unet", "forward", ("x", "timesteps", "y"), accepts_kwargs=False, requires_labels=True
    )

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Collection[int],
        dropout: float = 0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | None = None,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
    ) -> None:
        config = (UpsamplerConfig if isinstance(self, Upsampler) else UNetConfig)(
            image_size=image_size, in_channels=in_channels, model_channels=model_channels,
            out_channels=out_channels, num_res_blocks=num_res_blocks,
            attention_resolutions=tuple(attention_resolutions), dropout=dropout,
            channel_mult=tuple(channel_mult), conv_resample=conv_resample, dims=dims,
            num_classes=num_classes, use_checkpoint=use_checkpoint, num_heads=num_heads,
            num_head_channels=num_head_channels, num_heads_upsample=num_heads_upsample,
            use_scale_shift_norm=use_scale_shift_norm, resblock_updown=resblock_updown,
            use_new_attention_order=use_new_attention_order,
        )  # fmt: skip
        super().__init__(config)
        self._set_published_attributes(config, use_fp16)
        self.attention_resolutions, self.channel_mult = attention_resolutions, channel_mult
        self.in_channels = in_channels * self.input_copies
        self.num_classes = num_classes

    def forward(
        self, x: Tensor, timesteps: Tensor, y: Tensor | None = None, projected: Tensor | None = None
    ) -> Tensor:
        """Return the output for x [N, C, *spatial], contiguous and differentiable.

        timesteps: [N], or [1] for all images. y: classes [N], for a class-conditional network only. Raises:
        AssertionError if y is missing or not expected. projected: see `UNet.forward`; prepared steps pass it.
        """
        if projected is not None:
            return super().forward(x, timesteps, y, projected)
        return self.run_our_forward(x, timesteps, y=y)


class SuperResModel(UNetModel, Upsampler):
    """The published upsampler: a UNet whose input is x with `low_res`, enlarged bilinearly, appended."""

    accelerated_forward = ForwardMethod(
        "upsampler", "forward", ("x", "timesteps", "low_res"), True, requires_labels=True
    )

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        timesteps: Tensor,
        low_res: Tensor | None = None,
        y: Tensor | None = None,
        projected: Tensor | None = None,
    ) -> Tensor:
        """Return the output for x; low_res: [N, C, h, w] in the range of x. Otherwise as `UNetModel`."""
        if projected is not None:
            return Upsampler.forward(self, x, timesteps, y, low_res, projected)
        return self.run_our_forward(x, timesteps, low_res, y=y)


class EncoderUNetModel(_PublishedNet, Classifier):
    """The published noisy classifier, with the published arguments, attributes and initial weights.

    pool: "adaptive", "attention", "spatial" or "spatial_v2". Raises: InvalidArgument.
    """

    accelerated_forward = ForwardMethod(
        "classifier", "forward", ("x", "timesteps"), accepts_kwargs=False, requires_labels=False
    )

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Collection[int],
        dropout: float = 0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        pool: Pool = "adaptive",
    ) -> None:
        config = ClassifierConfig(
            image_size=image_size, in_channels=in_channels, model_channels=model_channels,
            out_channels=out_channels, num_res_blocks=num_res_blocks,
            attention_resolutions=tuple(attention_resolutions), dropout=dropout,
            channel_mult=tuple(channel_mult), conv_resample=conv_resample, dims=dims,
            use_checkpoint=use_checkpoint, num_heads=num_heads, num_head_channels=num_head_channels,
            num_heads_upsample=num_heads_upsample, use_scale_shift_norm=use_scale_shift_norm,
            resblock_updown=resblock_updown, use_new_attention_order=use_new_attention_order, pool=pool,
        )  # fmt: skip
        super().__init__(config)
        self._set_published_attributes(config, use_fp16)
        self.attention_resolutions, self.channel_mult = attention_resolutions, channel_mult
        self.in_channels, self.pool = in_channels, pool

    def forward(self, x: Tensor, timesteps: Tensor, projected: Tensor | None = None) -> Tensor:
        """Return logits [N, out_channels] for x [N, C, H, W]; timesteps: [N], or [1] for all images."""
        if projected is None and not self.pool.startswith("spatial"):
            return self.run_our_forward(x, timesteps)
        if projected is None:
            self.fold_now()
        return super().forward(x, timesteps.expand(len(x)), projected)


def _feature_size(config: NetConfig) -> int:
    """Return the sum of the output channels of all blocks, as the published constructor counts them."""
    widths, blocks = config.widths(), config.num_res_blocks
    size = widths[0] + sum(blocks * width for width in widths) + sum(widths[:-1]) + widths[-1]
    return size if isinstance(config, ClassifierConfig) else size + sum((blocks + 1) * w for w in widths)


def is_network(value: Any) -> bool:
    """Tell whether a value is one of these networks, in evaluation mode."""
    return isinstance(value, nn.Module) and isinstance(value, _PublishedNet) and not value.training
