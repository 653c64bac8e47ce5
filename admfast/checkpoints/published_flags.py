"""Find the flags with which the published scripts build a network and its diffusion process."""

from __future__ import annotations

import dataclasses
from typing import Any

from admfast.diffusion import DiffusionConfig
from admfast.errors import InvalidArgument, invalid
from admfast.models import ClassifierConfig, NetConfig, UpsamplerConfig
from admfast.models.config import (
    DEFAULT_CHANNEL_MULT,
    UNetConfig,
    classifier_config_from_flags,
    unet_config_from_flags,
    upsampler_config_from_flags,
)

# Image channels and classes, for which the scripts have no flag.
CHANNELS, CLASSES = 3, 1000
_SAME = (
    "num_res_blocks", "num_heads", "num_head_channels", "num_heads_upsample", "dropout",
    "use_scale_shift_norm", "resblock_updown", "use_new_attention_order",
)  # fmt: skip
_PROCESS = {"steps": "diffusion_steps"} | {
    name: name
    for name in (
        "noise_schedule", "use_kl", "predict_xstart", "rescale_timesteps", "rescale_learned_sigmas",
    )
}  # fmt: skip
UPSAMPLER_SIZES = (64, 256, 512)


def published_flags(
    config: NetConfig, process: DiffusionConfig | None = None, low_res_size: int | None = None
) -> dict[str, Any]:
    """Return the flags of the published scripts that build this network and its process.

    Source: `create_model`, `sr_create_model`, `create_classifier` and `create_gaussian_diffusion` of the
    published code. Settings that are not given (process, low_res_size) are left out.

    Raises: InvalidArgument for a setting that no flag gives; the error names the field.
    """
    if isinstance(config, ClassifierConfig):
        return _of_a_classifier(config)
    assert isinstance(config, UNetConfig)
    flags: dict[str, Any] = {
        "num_channels": config.model_channels,
        "attention_resolutions": _sides(config),
        "learn_sigma": config.learn_sigma,
        "class_cond": config.num_classes is not None,
        **{name: getattr(config, name) for name in _SAME},
    }
    fixed: dict[str, Any] = {"in_channels": CHANNELS, "num_classes": CLASSES}
    built: NetConfig
    if isinstance(config, UpsamplerConfig):
        if config.image_size not in UPSAMPLER_SIZES:
            raise _not_said("image_size", config, ", ".join(map(str, UPSAMPLER_SIZES)))
        del flags["use_new_attention_order"]
        flags["large_size"] = config.image_size
        built = upsampler_config_from_flags(small_size=low_res_size or 1, **flags, **fixed)
        flags |= {} if low_res_size is None else {"small_size": low_res_size}
    else:
        flags |= {"image_size": config.image_size, "channel_mult": _multipliers(config)}
        built = unet_config_from_flags(**flags, **fixed)
    _compare(config, built)
    return flags | ({} if process is None else _of_a_process(process))


def _of_a_classifier(config: ClassifierConfig) -> dict[str, Any]:
    """Return the flags of a classifier. The scripts choose its heads and multipliers themselves."""
    if config.image_size not in DEFAULT_CHANNEL_MULT:
        raise _not_said("image_size", config, ", ".join(map(str, sorted(DEFAULT_CHANNEL_MULT))))
    flags: dict[str, Any] = {
        "classifier_width": config.model_channels,
        "classifier_depth": config.num_res_blocks,
        "classifier_attention_resolutions": _sides(config),
        "classifier_use_scale_shift_norm": config.use_scale_shift_norm,
        "classifier_resblock_updown": config.resblock_updown,
        "classifier_pool": config.pool,
    }
    _compare(config, classifier_config_from_flags(image_size=config.image_size, **flags))
    return {"image_size": config.image_size, **flags}


def _sides(config: NetConfig) -> str:
    """Return the image sides with attention; "1", which no level has, for a network without attention."""
    attended = [2**level for level, on in enumerate(config.levels_with_attention()) if on]
    return ",".join(str(config.image_size // factor) for factor in attended) or "1"


def _multipliers(config: NetConfig) -> str:
    """Return the multipliers of the levels; "" if they are the default for the image size."""
    if config.channel_mult == DEFAULT_CHANNEL_MULT.get(config.image_size):
        return ""
    whole = [int(mult) for mult in config.channel_mult]
    if tuple(whole) != config.channel_mult:
        raise _not_said("channel_mult", config, "whole numbers, or the published default of the image size")
    return ",".join(map(str, whole))


def _compare(config: NetConfig, built: NetConfig) -> None:
    """Reject the first field in which the network built from the flags differs."""
    if config.levels_with_attention() != built.levels_with_attention():
        raise _not_said("attention_resolutions", config, "factors that divide the image's side")
    without_effect = {"attention_resolutions", "use_checkpoint"}
    if config.num_head_channels != -1:
        without_effect |= {"num_heads", "num_heads_upsample"}
    if config.resblock_updown:
        without_effect.add("conv_resample")
    for name in (entry.name for entry in dataclasses.fields(config) if entry.name not in without_effect):
        if getattr(config, name) != getattr(built, name):
            raise _not_said(name, config, str(getattr(built, name)))


def _of_a_process(process: DiffusionConfig) -> dict[str, Any]:
    """Return the flags of a diffusion process."""
    flags = {flag: getattr(process, name) for name, flag in _PROCESS.items()}
    built = DiffusionConfig.from_flags(**flags, learn_sigma=process.types[1].learned)
    for name, ours, theirs in zip(
        ("mean_type", "var_type", "loss_type"), process.types, built.types, strict=True
    ):
        if ours is not theirs:
            raise invalid(name, ours.name, f"{theirs.name}: the published scripts have no flag for another")
    return flags


def _not_said(name: str, config: NetConfig, allowed: str) -> InvalidArgument:
    return invalid(name, getattr(config, name), f"{allowed} in the published scripts")
