"""What turns images into features, and the features of a set of images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor


class ImageFeatures(NamedTuple):
    """Features of a batch: pooled [n, D] and, for sFID, spatial [n, S]."""

    pooled: Tensor
    spatial: Tensor | None = None


class FeatureNet(ABC):
    """A network that computes features of images, uint8 [N, H, W, C].

    Attributes: name: for tables and files. device: where it computes.
    """

    name: str
    device: torch.device

    @abstractmethod
    def __call__(self, images: Tensor) -> ImageFeatures:
        """Return the features of images, uint8 [N, H, W, C]. Raises InvalidArgument for other images."""

    def probabilities(self, pooled: Tensor) -> Tensor | None:
        """Return the class probabilities [N, K] of pooled features; None if the network has no classes."""
        return None
