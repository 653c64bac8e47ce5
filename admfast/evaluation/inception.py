"""Inception v3 as the published evaluators use it, with batch norms folded into the convolutions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from admfast.errors import CheckpointError, invalid
from admfast.evaluation.features import FeatureNet, ImageFeatures, Neighbours
from admfast.evaluation.inception_layers import (
    BLOCKS,
    CLASSES,
    FEATURES,
    SPATIAL_CHANNELS,
    SPATIAL_LAYER,
    STEM,
    Branch,
    Conv,
)
from admfast.evaluation.resize import resize_bilinear
from admfast.ops.conv import FoldedConv

SIDE = 299
_EPS = 0.001  # of the batch norms


class InceptionFeatures(FeatureNet):
    """Features of the published evaluator: 2048 pooled, 2023 spatial, and the classifier's probabilities.

    Images are resized to 299x299 as TensorFlow 1 does, and (x - 128) / 128 enters the network. Grey images
    are repeated three times. In float32; not differentiable.

    Source: Szegedy et al. 2015, the graph of 2015-12-05; the published evaluator takes pool_3, the first
    seven channels of mixed_6/conv [17, 17, 7], and softmax(pool_3 @ weight) without the bias.

    Args:
        tensors: the FID port's state dict (see `read_inception_weights`).
        device: where to compute.

    Raises:
        CheckpointError: if a tensor is missing or has another shape.
    """

    name = "inception"
    frechet_name, kernel_name, score_name = "FID", "KID", "Inception Score"
    neighbours = Neighbours(k=3, half=True)
    statistics_widths = (FEATURES, SPATIAL_CHANNELS * 17 * 17)

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._tensors = tensors
        self._convs: dict[str, FoldedConv] = {}
        channels = 3
        for conv in STEM:
            if conv is not None:
                channels = self._add("", conv, channels)
        for block, branches in BLOCKS.items():
            channels = self._add_block(block, branches, channels)
        weight = self._tensor("fc.weight", (CLASSES, FEATURES))
        self._class_weights = weight.to(self.device)
        del self._tensors

    def _tensor(self, key: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self._tensors.get(key)
        if tensor is None or tuple(tensor.shape) != shape:
            found = "it is missing" if tensor is None else f"it has {tuple(tensor.shape)}"
            raise CheckpointError(f"not the weights of the FID Inception: {key} must be {shape}; {found}")
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"not the weights of the FID Inception: {key} has NaN or infinity")
        return tensor.float()

    def _add(self, prefix: str, conv: Conv, channels: int) -> int:
        """Fold a batch norm into its convolution, in float64; return the number of output channels."""
        name = prefix + conv.name
        weight = self._tensor(f"{name}.conv.weight", (conv.channels, channels, *conv.kernel)).double()
        gamma, beta, mean, variance = (
            self._tensor(f"{name}.bn.{part}", (conv.channels,)).double()
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = gamma / (variance + _EPS).sqrt()
        folded = (weight * scale.reshape(-1, 1, 1, 1)).float().to(self.device)
        bias = (beta - mean * scale).float().to(self.device)
        self._convs[name] = FoldedConv(folded, bias, stride=conv.stride, padding=conv.padding)
        return conv.channels

    def _add_block(self, block: str, branches: tuple[Branch, ...], channels: int) -> int:
        """Add the convolutions of a block; return the number of channels of its output."""
        total = 0
        for branch in branches:
            width = channels
            for i, conv in enumerate(branch.convs):
                second = branch.split and i == len(branch.convs) - 1
                source = branch.convs[-3].channels if second else width
                width = self._add(f"{block}.", conv, source)
            total += width * (1 + branch.split)
        return total

    @torch.no_grad()
    def __call__(self, images: Tensor) -> ImageFeatures:
        """Return the features of images, uint8 [N, H, W, C] with C of 1 or 3.

        Raises InvalidArgument for other images.
        """
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[3] not in (1, 3):
            raise invalid("images", f"{images.dtype} {tuple(images.shape)}", "uint8 [N, H, W, 1 or 3]")
        x = images.to(self.device).movedim(-1, 1).expand(-1, 3, -1, -1)
        x = (resize_bilinear(x, SIDE, SIDE) - 128) / 128
        x = x.contiguous(memory_format=torch.channels_last)
        for conv in STEM:
            x = F.max_pool2d(x, 3, 2) if conv is None else self._conv(conv.name, x)
        spatial = None
        for block, branches in BLOCKS.items():
            outputs = []
            for branch in branches:
                outputs += self._branch(block, branch, x)
            if SPATIAL_LAYER.startswith(f"{block}."):
                spatial = outputs[0][:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
            x = torch.cat(outputs, 1)
        pooled = x.mean((2, 3))
        return ImageFeatures(pooled, spatial, (pooled @ self._class_weights.T).softmax(1))

    def _conv(self, name: str, x: Tensor) -> Tensor:
        return self._convs[name](x).relu_()

    def _branch(self, block: str, branch: Branch, x: Tensor) -> list[Tensor]:
        """Return the outputs of a branch: one, or two side by side."""
        if branch.pool == "reduce":
            x = F.max_pool2d(x, 3, 2)
        elif branch.pool == "maximum":
            x = F.max_pool2d(x, 3, 1, 1)
        elif branch.pool == "average":  # the zeros around the image don't count
            x = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        chain = branch.convs[: len(branch.convs) - 2 * branch.split]
        for conv in chain:
            x = self._conv(f"{block}.{conv.name}", x)
        if branch.split:
            return [self._conv(f"{block}.{conv.name}", x) for conv in branch.convs[-2:]]
        return [x]
