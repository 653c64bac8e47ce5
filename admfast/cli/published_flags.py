"""Translate the flags of the published sampling scripts to options of `admfast sample`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from admfast.errors import invalid

# Flags with an equivalent option; "" is the argument of the command, the model.
_RENAMED_FLAGS = {
    "--model_path": "",
    "--classifier_path": "--classifier",
    "--classifier_scale": "--guidance",
    "--timestep_respacing": "--respacing",
    "--batch_size": "--batch",
    "--base_samples": "--low-res",
}
# Options equivalent to a switch, by its value; or a text that says what to use instead.
_SWITCHES: dict[str, dict[bool, list[str] | str]] = {
    "--use_ddim": {True: ["--solver", "ddim"], False: ["--solver", "ddpm"]},
    "--clip_denoised": {True: [], False: "in Python only: pipe.sample(clip=False)"},
    "--use_fp16": {True: ["--precision", "fp16"], False: ["--precision", "fp32"]},
    "--classifier_use_fp16": dict.fromkeys(
        (True, False), "use --precision, for network and classifier; auto chooses by the device"
    ),
}
# Flags that describe a weights file, with their names in `--set NAME=VALUE`.
_FILE_SETTINGS = {
    f"--{name}": name
    for name in (
        "image_size", "num_channels", "num_res_blocks", "num_heads", "num_heads_upsample",
        "num_head_channels", "attention_resolutions", "channel_mult", "dropout", "class_cond",
        "use_checkpoint", "use_scale_shift_norm", "resblock_updown", "use_new_attention_order",
        "learn_sigma", "diffusion_steps", "noise_schedule", "use_kl", "predict_xstart",
        "rescale_timesteps", "rescale_learned_sigmas",
    )
} | {"--large_size": "image_size", "--small_size": "low_res_size"}  # fmt: skip
_CLASSIFIER_SETTINGS = {
    "--classifier_width": "model_channels",
    "--classifier_depth": "num_res_blocks",
    "--classifier_attention_resolutions": "attention_resolutions",
    "--classifier_use_scale_shift_norm": "use_scale_shift_norm",
    "--classifier_resblock_updown": "resblock_updown",
    "--classifier_pool": "pool",
}
FLAGS = {*_RENAMED_FLAGS, *_SWITCHES, *_FILE_SETTINGS, *_CLASSIFIER_SETTINGS, "--num_samples"}
_TRUE, _FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")


def translate_flags(args: Sequence[str]) -> list[str]:
    """Return a command's words with the published flags replaced by the equivalent options.

    Raises: InvalidArgument for a flag without a value, or a value without an equivalent option.
    """
    words: list[str] = []
    remaining = list(args)
    while remaining:
        word = remaining.pop(0)
        flag, separator, value = word.partition("=")
        if flag not in FLAGS:
            words.append(word)
            continue
        if not separator:
            if not remaining:
                raise invalid(flag, "", "needs a value")
            value = remaining.pop(0)
        words += _translate_one(flag, value)
    return words


def _translate_one(flag: str, value: str) -> list[str]:
    """Return the words that are equivalent to a published flag."""
    if flag in _RENAMED_FLAGS:
        return [_RENAMED_FLAGS[flag], value] if _RENAMED_FLAGS[flag] else [value]
    if flag in _FILE_SETTINGS:
        return ["--set", f"{_FILE_SETTINGS[flag]}={value}"]
    if flag in _CLASSIFIER_SETTINGS:
        return ["--set-classifier", f"{_CLASSIFIER_SETTINGS[flag]}={value}"]
    if flag == "--num_samples":
        if not re.fullmatch(r"0*[1-9][0-9]{0,18}", value):
            raise invalid(flag, value, "1 or more; --seeds chooses which")
        return ["--seeds", f"0-{int(value) - 1}"]
    if value.lower() not in (*_TRUE, *_FALSE):
        raise invalid(flag, value, "True or False")
    equivalent = _SWITCHES[flag][value.lower() in _TRUE]
    if isinstance(equivalent, str):
        raise invalid(flag, value, equivalent)
    return equivalent
