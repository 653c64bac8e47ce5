"""Small networks for the tests of weights files."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from admfast.models import (
    ClassifierConfig,
    NetConfig,
    UNetConfig,
    UpsamplerConfig,
    build,
)

UNET = UNetConfig(
    image_size=16,
    in_channels=3,
    model_channels=32,
    out_channels=6,
    num_res_blocks=1,
    attention_resolutions=(2,),
    channel_mult=(1, 2),
    num_head_channels=32,
    use_scale_shift_norm=True,
    resblock_updown=True,
    num_classes=10,
)
UPSAMPLER = UpsamplerConfig(
    image_size=16,
    in_channels=1,
    model_channels=32,
    out_channels=2,
    num_res_blocks=1,
    attention_resolutions=(),
    channel_mult=(1, 1),
    num_heads=2,
)
CLASSIFIER = ClassifierConfig(
    image_size=16,
    in_channels=3,
    model_channels=32,
    out_channels=10,
    num_res_blocks=2,
    attention_resolutions=(1, 2),
    channel_mult=(1, 2, 2),
    num_head_channels=32,
    use_scale_shift_norm=True,
    resblock_updown=True,
    pool="attention",
)


def state_of(config: NetConfig, seed: int = 0) -> dict[str, Tensor]:
    """A state dict with no zeros in it: what ADM begins with zero would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: 0.1 * torch.randn(value.shape, generator=generator)
        for key, value in build(config).state_dict().items()
    }


def random_config(seed: int) -> NetConfig:
    """Some configuration of any kind, every option drawn; widths of 32 to 192."""
    rng = random.Random(seed)
    kind = rng.choice(["unet", "upsampler", "classifier"])
    levels = rng.randint(1, 4)
    base = rng.choice([32, 64, 96])
    widths = [32 * rng.randint(1, 2) for _ in range(levels)]
    channels = rng.choice([1, 2, 3, 4])
    shared = {
        "image_size": 32,
        "in_channels": channels,
        "model_channels": base,
        "num_res_blocks": rng.randint(1, 3),
        "attention_resolutions": tuple(2**i for i in range(levels) if rng.random() < 0.4),
        "channel_mult": tuple(_multiplier(width, base) for width in widths),
        "conv_resample": rng.random() < 0.7,
        "dropout": rng.choice([0.0, 0.1]),
        "num_heads": rng.choice([1, 2, 4]),
        "num_head_channels": rng.choice([-1, 16, 32]),
        "use_scale_shift_norm": rng.random() < 0.5,
        "resblock_updown": rng.random() < 0.5,
        "use_new_attention_order": rng.random() < 0.5,
    }
    if kind == "classifier":
        pool = rng.choice(["adaptive", "attention", "spatial", "spatial_v2"])
        dims = rng.choice([1, 2, 3]) if pool.startswith("spatial") else 2
        if pool == "attention" and shared["num_head_channels"] == -1:
            shared["num_head_channels"] = 32
        return ClassifierConfig(**shared, dims=dims, pool=pool, out_channels=rng.choice([2, 10, 1000]))
    cls = UNetConfig if kind == "unet" else UpsamplerConfig
    return cls(
        **shared,
        dims=rng.choice([1, 2, 2, 3]),
        num_classes=rng.choice([None, 10]),
        out_channels=channels * rng.choice([1, 2]),
    )


def _multiplier(width: int, base: int) -> float:
    """A multiplier that gives the width, in the way a person would write it where that is exact."""
    multiplier = width / base
    if int(multiplier * base) != width:
        multiplier += 1e-9
    return int(multiplier) if multiplier.is_integer() else multiplier
