"""Networks and processes from command-line flags, under the names of the published `script_util.py`."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from admfast.checkpoints.config_to_flags import UPSAMPLER_SIZES
from admfast.compat.guided_diffusion.gaussian_diffusion import get_named_beta_schedule
from admfast.compat.guided_diffusion.respace import SpacedDiffusion, space_timesteps
from admfast.compat.guided_diffusion.unet import EncoderUNetModel, SuperResModel, UNetModel
from admfast.diffusion import DiffusionConfig
from admfast.errors import invalid
from admfast.models.config import (
    classifier_config_from_flags,
    unet_config_from_flags,
    upsampler_config_from_flags,
)

NUM_CLASSES = 1000
_TRUE_WORDS, _FALSE_WORDS = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")


def diffusion_defaults() -> dict[str, Any]:
    """Return the flags of a process with their defaults."""
    return dict(
        learn_sigma=False,
        diffusion_steps=1000,
        noise_schedule="linear",
        timestep_respacing="",
        use_kl=False,
        predict_xstart=False,
        rescale_timesteps=False,
        rescale_learned_sigmas=False,
    )


def classifier_defaults() -> dict[str, Any]:
    """Return the flags of a classifier with their defaults."""
    return dict(
        image_size=64,
        classifier_use_fp16=False,
        classifier_width=128,
        classifier_depth=2,
        classifier_attention_resolutions="32,16,8",
        classifier_use_scale_shift_norm=True,
        classifier_resblock_updown=True,
        classifier_pool="attention",
    )


def model_and_diffusion_defaults() -> dict[str, Any]:
    """Return the flags of a network and its process with their defaults."""
    network = dict(
        image_size=64,
        num_channels=128,
        num_res_blocks=2,
        num_heads=4,
        num_heads_upsample=-1,
        num_head_channels=-1,
        attention_resolutions="16,8",
        channel_mult="",
        dropout=0.0,
        class_cond=False,
        use_checkpoint=False,
        use_scale_shift_norm=True,
        resblock_updown=False,
        use_fp16=False,
        use_new_attention_order=False,
    )
    return network | diffusion_defaults()


def classifier_and_diffusion_defaults() -> dict[str, Any]:
    """Return the flags of a classifier and its process with their defaults."""
    return classifier_defaults() | diffusion_defaults()


def sr_model_and_diffusion_defaults() -> dict[str, Any]:
    """Return the flags of an upsampler and its process with their defaults."""
    parameters = inspect.signature(sr_create_model_and_diffusion).parameters
    flags = model_and_diffusion_defaults() | dict(large_size=256, small_size=64)
    return {name: value for name, value in flags.items() if name in parameters}


def create_model_and_diffusion(
    image_size: int,
    class_cond: bool,
    learn_sigma: bool,
    num_channels: int,
    num_res_blocks: int,
    channel_mult: str,
    num_heads: int,
    num_head_channels: int,
    num_heads_upsample: int,
    attention_resolutions: str,
    dropout: float,
    diffusion_steps: int,
    noise_schedule: str,
    timestep_respacing: str,
    use_kl: bool,
    predict_xstart: bool,
    rescale_timesteps: bool,
    rescale_learned_sigmas: bool,
    use_checkpoint: bool,
    use_scale_shift_norm: bool,
    resblock_updown: bool,
    use_fp16: bool,
    use_new_attention_order: bool,
) -> tuple[UNetModel, SpacedDiffusion]:
    """Return the network and the process for the flags of `model_and_diffusion_defaults`.

    Raises: InvalidArgument.
    """
    return _create_with_process(create_model, dict(locals()))


def create_model(
    image_size: int,
    num_channels: int,
    num_res_blocks: int,
    channel_mult: str = "",
    learn_sigma: bool = False,
    class_cond: bool = False,
    use_checkpoint: bool = False,
    attention_resolutions: str = "16",
    num_heads: int = 1,
    num_head_channels: int = -1,
    num_heads_upsample: int = -1,
    use_scale_shift_norm: bool = False,
    dropout: float = 0,
    resblock_updown: bool = False,
    use_fp16: bool = False,
    use_new_attention_order: bool = False,
) -> UNetModel:
    """Return a UNet, with `NUM_CLASSES` classes if `class_cond`.

    attention_resolutions: image sides at which it has attention. channel_mult: "1,2,4", "0.5,1,1", or "" for
    the published multipliers, which sizes 64, 128, 256 and 512 have. Raises: InvalidArgument.
    """
    flags = dict(locals())
    return _build_network(UNetModel, unet_config_from_flags, flags | {"num_classes": NUM_CLASSES})


def create_classifier_and_diffusion(
    image_size: int,
    classifier_use_fp16: bool,
    classifier_width: int,
    classifier_depth: int,
    classifier_attention_resolutions: str,
    classifier_use_scale_shift_norm: bool,
    classifier_resblock_updown: bool,
    classifier_pool: Any,
    learn_sigma: bool,
    diffusion_steps: int,
    noise_schedule: str,
    timestep_respacing: str,
    use_kl: bool,
    predict_xstart: bool,
    rescale_timesteps: bool,
    rescale_learned_sigmas: bool,
) -> tuple[EncoderUNetModel, SpacedDiffusion]:
    """Return the classifier and the process for the flags of `classifier_and_diffusion_defaults`."""
    return _create_with_process(create_classifier, dict(locals()))


def create_classifier(
    image_size: int,
    classifier_use_fp16: bool,
    classifier_width: int,
    classifier_depth: int,
    classifier_attention_resolutions: str,
    classifier_use_scale_shift_norm: bool,
    classifier_resblock_updown: bool,
    classifier_pool: Any,
) -> EncoderUNetModel:
    """Return a noisy classifier of 1000 classes, with heads of 64 channels."""
    flags = dict(locals())
    use_fp16 = flags.pop("classifier_use_fp16")
    return _build_network(EncoderUNetModel, classifier_config_from_flags, flags | {"use_fp16": use_fp16})


def sr_create_model_and_diffusion(
    large_size: int,
    small_size: int,
    class_cond: bool,
    learn_sigma: bool,
    num_channels: int,
    num_res_blocks: int,
    num_heads: int,
    num_head_channels: int,
    num_heads_upsample: int,
    attention_resolutions: str,
    dropout: float,
    diffusion_steps: int,
    noise_schedule: str,
    timestep_respacing: str,
    use_kl: bool,
    predict_xstart: bool,
    rescale_timesteps: bool,
    rescale_learned_sigmas: bool,
    use_checkpoint: bool,
    use_scale_shift_norm: bool,
    resblock_updown: bool,
    use_fp16: bool,
) -> tuple[SuperResModel, SpacedDiffusion]:
    """Return the upsampler and the process for the flags of `sr_model_and_diffusion_defaults`."""
    return _create_with_process(sr_create_model, dict(locals()))


def sr_create_model(
    large_size: int,
    small_size: int,
    num_channels: int,
    num_res_blocks: int,
    learn_sigma: bool,
    class_cond: bool,
    use_checkpoint: bool,
    attention_resolutions: str,
    num_heads: int,
    num_head_channels: int,
    num_heads_upsample: int,
    use_scale_shift_norm: bool,
    dropout: float,
    resblock_updown: bool,
    use_fp16: bool,
) -> SuperResModel:
    """Return an upsampler to 64, 256 or 512 pixels (512 has the channel multipliers of 256).

    small_size: 1 to `large_size`; the network takes low-resolution images of any size.
    Raises: InvalidArgument.
    """
    flags = dict(locals())
    if large_size not in UPSAMPLER_SIZES:
        raise invalid("large_size", large_size, ", ".join(map(str, UPSAMPLER_SIZES)))
    return _build_network(SuperResModel, upsampler_config_from_flags, flags | {"num_classes": NUM_CLASSES})


def _build_network(network: Any, configuration: Callable[..., Any], flags: dict[str, Any]) -> Any:
    """Return the network that its flags describe."""
    use_fp16 = flags.pop("use_fp16")
    return network(**dataclasses.asdict(configuration(**flags)), use_fp16=use_fp16)


def _create_with_process(create: Any, flags: Mapping[str, Any]) -> Any:
    """Return the network that `create` makes from the flags it takes, and the process for the others."""
    parameters, process_flags = inspect.signature(create).parameters, diffusion_defaults()
    network = create(**{name: value for name, value in flags.items() if name in parameters})
    settings = {name: value for name, value in flags.items() if name in process_flags}
    settings["steps"] = settings.pop("diffusion_steps")
    return network, create_gaussian_diffusion(**settings)


def create_gaussian_diffusion(
    *,
    steps: int = 1000,
    learn_sigma: bool = False,
    sigma_small: bool = False,
    noise_schedule: str = "linear",
    use_kl: bool = False,
    predict_xstart: bool = False,
    rescale_timesteps: bool = False,
    rescale_learned_sigmas: bool = False,
    timestep_respacing: str | Iterable[int] = "",
) -> SpacedDiffusion:
    """Return a respaced process; see `admfast.diffusion.DiffusionConfig`. Raises: InvalidArgument."""
    mean, var, loss = DiffusionConfig(
        noise_schedule=noise_schedule, steps=steps, learn_sigma=learn_sigma, sigma_small=sigma_small,
        use_kl=use_kl, predict_xstart=predict_xstart, rescale_learned_sigmas=rescale_learned_sigmas,
    ).types  # fmt: skip
    return SpacedDiffusion(
        use_timesteps=space_timesteps(steps, timestep_respacing or [steps]),
        betas=get_named_beta_schedule(noise_schedule, steps),
        model_mean_type=mean,
        model_var_type=var,
        loss_type=loss,
        rescale_timesteps=rescale_timesteps,
    )


def add_dict_to_argparser(parser: argparse.ArgumentParser, default_dict: Mapping[str, Any]) -> None:
    """Add an option --NAME of the same type for each default; None takes text, a boolean takes `str2bool`."""
    for name, default in default_dict.items():
        kind = str if default is None else str2bool if isinstance(default, bool) else type(default)
        parser.add_argument(f"--{name}", default=default, type=kind)


def args_to_dict(args: argparse.Namespace, keys: Iterable[str]) -> dict[str, Any]:
    """Return the parsed options that have these names."""
    return {key: getattr(args, key) for key in keys}


def str2bool(v: str | bool) -> bool:
    """Convert a word to a boolean: yes, true, t, y, 1, or no, false, f, n, 0, in any case."""
    word = str(v).lower()
    if word not in (*_TRUE_WORDS, *_FALSE_WORDS):
        raise argparse.ArgumentTypeError("boolean value expected")
    return word in _TRUE_WORDS
