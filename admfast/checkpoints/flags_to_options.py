"""Translate flags of the published scripts to options of a weights file.

Flags with the same name and meaning in admfast (num_heads, noise_schedule, learn_sigma, ...) are not listed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from admfast.checks import boolean, whole_numbers
from admfast.errors import invalid, show_value
from admfast.models import NetConfig, UNetConfig
from admfast.models.config import parse_attention_resolutions, parse_channel_mult

LOG = logging.getLogger("admfast")

# Published flag -> the option that means the same.
OPTION_OF_FLAG = {
    "num_channels": "model_channels",
    "diffusion_steps": "steps",
    "large_size": "image_size",
    "classifier_width": "model_channels",
    "classifier_depth": "num_res_blocks",
    "classifier_attention_resolutions": "attention_resolutions",
    "classifier_use_scale_shift_norm": "use_scale_shift_norm",
    "classifier_resblock_updown": "resblock_updown",
    "classifier_pool": "pool",
}
# Flags that describe the computation, not the file -> the option to use instead.
COMPUTATION_FLAGS = {
    name: 'precision="fp16" (--precision fp16)' for name in ("use_fp16", "classifier_use_fp16")
}
# Flags that don't describe the file -> where to give them.
WHERE_TO_GIVE = {
    "model_path": "the first argument of load (the command's first word)",
    "classifier_path": "classifier= of load (--classifier)",
    "base_samples": "low_res= of sample (--low-res)",
    "small_size": "low_res_size in upsampler_options (--set-upsampler low_res_size=...)",
    "timestep_respacing": "respacing= of sample (--respacing)",
    "use_ddim": 'solver="ddim" of sample (--solver ddim)',
    "classifier_scale": "guidance= of sample (--guidance)",
    "clip_denoised": "clip= of sample",
    "num_samples": "seeds= of sample, one an image (--seeds)",
    "batch_size": "batch_size= of sample (--batch)",
    **dict.fromkeys(
        (
            "data_dir", "val_data_dir", "schedule_sampler", "lr", "weight_decay", "lr_anneal_steps",
            "anneal_lr", "microbatch", "ema_rate", "log_interval", "eval_interval", "save_interval",
            "resume_checkpoint", "fp16_scale_growth", "noised", "iterations",
        ),
        "a flag of training, which does not describe a file",
    ),
}  # fmt: skip
FLAG_NAMES = {*OPTION_OF_FLAG, *COMPUTATION_FLAGS, *WHERE_TO_GIVE, "class_cond"}
FLAG_SWITCHES = {
    "class_cond", "use_ddim", "clip_denoised", "anneal_lr", "noised", *COMPUTATION_FLAGS,
    "classifier_use_scale_shift_norm", "classifier_resblock_updown",
}  # fmt: skip


def option_name(flag: str) -> str:
    """Return the name of an option in admfast."""
    return OPTION_OF_FLAG.get(flag, flag)


def translate_flags(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, tuple[str, Any]]]:
    """Return the options under their names in admfast, and claims that the network must agree with.

    Claims are (flag, value) by name in admfast; see `check_claims`.

    Raises:
        InvalidArgument: for a flag that doesn't describe the file, or for two flags that mean the same.
    """
    translated: dict[str, Any] = {}
    claims: dict[str, tuple[str, Any]] = {}
    reject_flags_given_elsewhere(options)
    for flag, value in options.items():
        name = option_name(flag)
        synonyms = [other for other in options if other != flag and option_name(other) == name]
        if synonyms:
            # The name in admfast comes last, so that the error is about the published flag.
            first, second = sorted((flag, *synonyms), key=lambda synonym: synonym == name)[:2]
            same_as = f"{second}={show_value(options[second])}"
            raise invalid(first, options[first], f"the same as {same_as}; give one of them")
        if flag in COMPUTATION_FLAGS:
            boolean(flag, value)
            replacement = COMPUTATION_FLAGS[flag]
            LOG.warning("%s describes the computation, not the file: use %s instead", flag, replacement)
        elif name == "class_cond":
            claims[name] = flag, boolean(flag, value)
        elif name == "attention_resolutions" and value is not None:
            # Check the value now; compare it with the network when that is known.
            if isinstance(value, str):
                parse_attention_resolutions(value, 1, flag)
            claims[name] = flag, value if isinstance(value, str) else tuple(whole_numbers(flag, value, 1))
        elif name == "channel_mult" and isinstance(value, str):
            if value.strip():
                translated[name] = parse_channel_mult(value, 0)
            else:  # means the published default for the image size
                claims[name] = flag, value
        else:
            translated[name] = value
    return translated, claims


def reject_flags_given_elsewhere(options: Mapping[str, Any]) -> None:
    """Reject flags that don't describe the file; the error says where to give them."""
    for flag, value in options.items():
        if flag in WHERE_TO_GIVE:
            raise invalid(flag, value, f"here {WHERE_TO_GIVE[flag]}")


def check_claims(config: NetConfig, claims: Mapping[str, tuple[str, Any]]) -> None:
    """Reject claims that the configuration of the network contradicts.

    Attention resolutions may be image sides ("32,16,8", as published) or downsampling factors; one of the two
    readings must agree.
    """
    if "class_cond" in claims and isinstance(config, UNetConfig):
        flag, value = claims["class_cond"]
        conditional = config.num_classes is not None
        if value != conditional:
            classes = f"has classes (num_classes={config.num_classes})" if conditional else "has no classes"
            raise invalid(flag, value, f"the network {classes}")
    if "channel_mult" in claims:
        flag, value = claims["channel_mult"]
        default = parse_channel_mult(value, config.image_size)
        if tuple(int(mult * config.model_channels) for mult in default) != config.widths():
            raise invalid(flag, value, f"the network has {config.channel_mult}")
    if "attention_resolutions" in claims:
        _check_attention(config, *claims["attention_resolutions"])


def _check_attention(config: NetConfig, flag: str, value: Any) -> None:
    levels = {2**level for level in range(len(config.channel_mult))}
    attended_factors = levels & set(config.attention_resolutions)
    as_sides = levels & set(parse_attention_resolutions(value, config.image_size, flag))
    as_factors = None if isinstance(value, str) else levels & set(value)
    if attended_factors not in (as_sides, as_factors):
        sides = ", ".join(str(config.image_size // factor) for factor in sorted(attended_factors)) or "none"
        factors = ", ".join(map(str, sorted(attended_factors))) or "none"
        allowed = f"the network has attention at sides {sides}, downsampling factors {factors}"
        raise invalid(flag, value, allowed)
