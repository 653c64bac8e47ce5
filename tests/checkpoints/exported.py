"""Networks that diffusers can represent, one for each option, for tests with and without diffusers."""

from __future__ import annotations

import dataclasses

import torch

from admfast.models import UNetConfig
from tests.parity.golden import NETWORK_OUTPUT_LIMIT
from tests.small import SMALL_UNET, randn

# Changes to SMALL_UNET. Some have three levels, because their option differs between levels.
HELD: dict[str, dict[str, object]] = {
    "legacy-order": {},
    "new-order": {"use_new_attention_order": True},
    "several-heads": {"channel_mult": (1, 2, 3), "attention_resolutions": (2, 4)},
    "convolutions": {"resblock_updown": False},
    "embedding-added": {"use_scale_shift_norm": False},
    "attention-first-and-last": {
        "channel_mult": (1, 2, 2),
        "attention_resolutions": (1, 4),
        "num_res_blocks": 2,
    },
    "attention-in-the-middle-only": {"attention_resolutions": (), "resblock_updown": False},
    "one-level": {"channel_mult": (1,), "attention_resolutions": (1,)},
    "one-head": {"num_head_channels": -1, "channel_mult": (1, 2, 2), "attention_resolutions": (1, 2)},
    "heads-by-number": {"num_head_channels": -1, "num_heads": 4, "channel_mult": (1, 2, 2)},
    "no-classes": {"num_classes": None},
    "no-variance": {"out_channels": 3},
    "wide-base": {"model_channels": 64, "num_head_channels": 16},
    "resampling-unused": {"conv_resample": False},
}


def held(name: str) -> UNetConfig:
    """Return the configuration with this name in HELD."""
    return dataclasses.replace(SMALL_UNET, **HELD[name])  # type: ignore[arg-type]


def inputs(config: UNetConfig, dtype: torch.dtype = torch.float64):
    """Return images, timesteps and classes (or None) for a network of this configuration."""
    side = config.image_size
    classes = None if config.num_classes is None else torch.tensor([0, config.num_classes - 1])
    return randn(2, config.in_channels, side, side, dtype=dtype), torch.tensor([17, 930]), classes


def assert_same_output(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Assert that outputs differ by at most the float32 limit of published networks, scaled to the dtype."""
    assert found.dtype == wanted.dtype
    limit = NETWORK_OUTPUT_LIMIT * torch.finfo(wanted.dtype).eps / torch.finfo(torch.float32).eps
    assert (found - wanted).abs().max() <= limit * wanted.abs().max()
