"""Floor 2: the networks and their configurations; parameters are named as in the released checkpoints."""

from __future__ import annotations

from torch import nn

from admfast.models.classifier import Classifier
from admfast.models.config import (
    ClassifierConfig,
    NetConfig,
    UNetConfig,
    UpsamplerConfig,
    classifier_config_from_flags,
    config_from_dict,
    unet_config_from_flags,
    upsampler_config_from_flags,
)
from admfast.models.unet import UNet
from admfast.models.upsampler import Upsampler


def build(config: NetConfig) -> nn.Module:
    """Build the network that `config` describes, with fresh weights, in evaluation mode."""
    if isinstance(config, UpsamplerConfig):
        return Upsampler(config).eval()
    if isinstance(config, UNetConfig):
        return UNet(config).eval()
    if isinstance(config, ClassifierConfig):
        return Classifier(config).eval()
    raise TypeError(f"config={type(config).__name__}: a UNetConfig, UpsamplerConfig or ClassifierConfig")


__all__ = [
    "Classifier",
    "ClassifierConfig",
    "NetConfig",
    "UNet",
    "UNetConfig",
    "Upsampler",
    "UpsamplerConfig",
    "build",
    "classifier_config_from_flags",
    "config_from_dict",
    "unet_config_from_flags",
    "upsampler_config_from_flags",
]
