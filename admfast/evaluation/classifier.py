"""Features of a noisy classifier of ADM at timestep 0: they need no download and know the training set."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from admfast.checkpoints import load_network
from admfast.checkpoints.reading import WeightsSource
from admfast.errors import invalid
from admfast.evaluation.features import FeatureNet, ImageFeatures
from admfast.files.levels import from_uint8
from admfast.models.classifier import Classifier
from admfast.models.config import ClassifierConfig


class ClassifierFeatures(FeatureNet):
    """Features of an ADM classifier: the input of its last pool averaged over the image, and its classes.

    Of the classifiers with spatial pools, the features are the hidden layer's output. Images are those of the
    classifier's training: of its size, as x = image / 127.5 - 1, at timestep 0. In float32.

    Args:
        source: weights file, name of a shipped classifier, or anything else that `load_network` reads.
        device: where to compute.
        name: for tables; None takes that of the source.

    Raises:
        InvalidArgument: if the file holds no classifier. CheckpointError: if it can't be read.
    """

    def __init__(
        self,
        source: WeightsSource | Classifier,
        device: torch.device | str = "cpu",
        name: str | None = None,
    ) -> None:
        net = source if isinstance(source, Classifier) else load_network(source, device=device)[0]
        if not isinstance(net, Classifier):
            raise invalid("features", str(source), "a classifier's weights, inception, or a DINOv2 folder")
        self.name = name or ("classifier" if isinstance(source, Mapping | nn.Module) else str(source))
        self.net, self.device = net.eval(), torch.device(device)
        self.config: ClassifierConfig = net.config
        self.net.fold()
        # The features are the input of the layer after the pool: [N, D], or [N, D, H, W] before the pool.
        self._last = net.out[-1] if net.config.pool.startswith("spatial") else net.out[2]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> ImageFeatures:
        """Return the features of images, uint8 [N, H, W, C] of the classifier's size and channels.

        Raises InvalidArgument for other images.
        """
        config = self.config
        expected = (config.image_size, config.image_size, config.in_channels)
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != expected:
            actual = f"{images.dtype} {tuple(images.shape)}"
            raise invalid("images", actual, f"uint8 [N, {expected[0]}, {expected[1]}, {expected[2]}]")
        inputs: list[Tensor] = []
        hook = self._last.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
        try:
            x = from_uint8(images.to(self.device))
            logits = self.net(x, torch.zeros(len(x), device=self.device))
        finally:
            hook.remove()
        return ImageFeatures(
            inputs[0].float().flatten(2).mean(2) if inputs[0].dim() > 2 else inputs[0].float(),
            None,
            logits.softmax(1),
        )
