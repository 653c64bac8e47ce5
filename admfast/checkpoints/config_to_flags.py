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
_SAME_NAMES = (
    "num_res_blocks", "num_heads", "num_head_channels", "num_heads_upsample", "dropout",
    "use_scale_shift_norm", "resblock_updown", "use_new_attention_order",
)  # fmt: skip
_PROCESS_FLAGS = {"steps": "diffusion_steps"} | {
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
        return _classifier_flags(config)
    assert isinstance(config, UNetConfig)
    flags: dict[str, Any] = {
        "num_channels": config.model_channels,
        "attention_resolutions": _attention_sides(config),
        "learn_sigma": config.learn_sigma,
        "class_cond": config.num_classes is not None,
        **{name: getattr(config, name) for name in _SAME_NAMES},
    }
    fixed: dict[str, Any] = {"in_channels": CHANNELS, "num_classes": CLASSES}
    rebuilt: NetConfig
    if isinstance(config, UpsamplerConfig):
        if config.image_size not in UPSAMPLER_SIZES:
            raise _no_flag_error("image_size", config, ", ".join(map(str, UPSAMPLER_SIZES)))
        del flags["use_new_attention_order"]
        flags["large_size"] = config.image_size
        rebuilt = upsampler_config_from_flags(small_size=low_res_size or 1, **flags, **fixed)
        flags |= {} if low_res_size is None else {"small_size": low_res_size}
    else:
        flags |= {"image_size": config.image_size, "channel_mult": _channel_mult_flag(config)}
        rebuilt = unet_config_from_flags(**flags, **fixed)
    _check_same_network(config, rebuilt)
    return flags | ({} if process is None else _process_flags(process))


def _classifier_flags(config: ClassifierConfig) -> dict[str, Any]:
    """Return the flags of a classifier. The scripts choose its heads and multipliers themselves."""
    if config.image_size not in DEFAULT_CHANNEL_MULT:
        raise _no_flag_error("image_size", config, ", ".join(map(str, sorted(DEFAULT_CHANNEL_MULT))))
    flags: dict[str, Any] = {
        "classifier_width": config.model_channels,
        "classifier_depth": config.num_res_blocks,
        "classifier_attention_resolutions": _attention_sides(config),
        "classifier_use_scale_shift_norm": config.use_scale_shift_norm,
        "classifier_resblock_updown": config.resblock_updown,
        "classifier_pool": config.pool,
    }
    _check_same_network(config, classifier_config_from_flags(image_size=config.image_size, **flags))
    return {"image_size": config.image_size, **flags}


def _attention_sides(config: NetConfig) -> str:
    """Return the image sides with attention; "1", which no level has, for a network without attention."""
    factors = [2**level for level, on in enumerate(config.levels_with_attention()) if on]
    return ",".join(str(config.image_size // factor) for factor in factors) or "1"


def _channel_mult_flag(config: NetConfig) -> str:
    """Return the multipliers of the levels; "" if they are the default for the image size."""
    if config.channel_mult == DEFAULT_CHANNEL_MULT.get(config.image_size):
        return ""
    integers = [int(mult) for mult in config.channel_mult]
    if tuple(integers) != config.channel_mult:
        raise _no_flag_error(
            "channel_mult", config, "whole numbers, or the published default of the image size"
        )
    return ",".join(map(str, integers))


def _check_same_network(config: NetConfig, rebuilt: NetConfig) -> None:
    """Reject the first field in which the network built from the flags differs."""
    if config.levels_with_attention() != rebuilt.levels_with_attention():
        raise _no_flag_error("attention_resolutions", config, "factors that divide the image's side")
    without_effect = {"attention_resolutions", "use_checkpoint"}
    if config.num_head_channels != -1:
        without_effect |= {"num_heads", "num_heads_upsample"}
    if config.resblock_updown:
        without_effect.add("conv_resample")
    for name in (entry.name for entry in dataclasses.fields(config) if entry.name not in without_effect):
        if getattr(config, name) != getattr(rebuilt, name):
            raise _no_flag_error(name, config, str(getattr(rebuilt, name)))


def _process_flags(process: DiffusionConfig) -> dict[str, Any]:
    """Return the flags of a diffusion process."""
    flags = {flag: getattr(process, name) for name, flag in _PROCESS_FLAGS.items()}
    rebuilt = DiffusionConfig.from_flags(**flags, learn_sigma=process.types[1].learned)
    for name, ours, theirs in zip(
        ("mean_type", "var_type", "loss_type"), process.types, rebuilt.types, strict=True
    ):
        if ours is not theirs:
            raise invalid(name, ours.name, f"{theirs.name}: the published scripts have no flag for another")
    return flags


def _no_flag_error(name: str, config: NetConfig, allowed: str) -> InvalidArgument:
    return invalid(name, getattr(config, name), f"{allowed} in the published scripts")
