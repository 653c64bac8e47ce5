"""Convert a UNet to a `UNet2DModel` of the library diffusers, with the configuration of its scheduler.

It follows the behaviour of diffusers 0.42, which need not be installed. Names of the modules, for block `i`
of level `l` (level 0 has the highest resolution; `u` is the same level counted from the lowest):

    time_embed.0, .2                 time_embedding.linear_1, .linear_2
    label_emb                        class_embedding
    input_blocks.0.0                 conv_in
    input_blocks.K.0, .1             down_blocks.l: resnets.i, attentions.i
    last input block of a level      down_blocks.l: downsamplers.0
    middle_block.0, .1, .2           mid_block: resnets.0, attentions.0, resnets.1
    output_blocks.K.0, .1, last one  up_blocks.u: resnets.i, attentions.i, upsamplers.0
    out.0, .2                        conv_norm_out, conv_out

Rows of qkv, [3, h, d] or legacy [h, 3, d], become three linear layers to_q, to_k and to_v, [h, d] each;
legacy rows are permuted first. Nothing is computed: every value is copied from the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from admfast.checks import one_of
from admfast.diffusion import DiffusionConfig
from admfast.diffusion.parameterisation import MeanType, VarType
from admfast.diffusion.schedule import beta_schedule
from admfast.errors import invalid
from admfast.models.config import GROUPS, NetConfig, UNetConfig
from admfast.models.layers import legacy_row_order

VERSION = "0.42.1"  # of diffusers
# The user's name of a scheduler -> the classes of scheduler and pipeline in diffusers.
SCHEDULERS = {"ddim": ("DDIMScheduler", "DDIMPipeline"), "ddpm": ("DDPMScheduler", "DDPMPipeline")}

_RESBLOCK_LAYERS = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_TOP_LEVEL_LAYERS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def check_network(config: NetConfig) -> None:
    """Reject a network that `UNet2DModel` can't represent exactly.

    Raises: InvalidArgument, which names the field.
    """
    if type(config) is not UNetConfig:
        raise invalid("kind", config.kind, "unet: diffusers' UNet2DModel is one")
    if config.dims != 2:
        raise invalid("dims", config.dims, "2: diffusers' UNet2DModel has two")
    if not config.outputs_images:
        allowed = f"{config.in_channels} or, with learned variance, {2 * config.in_channels}"
        raise invalid("out_channels", config.out_channels, f"{allowed}, as diffusers' pipelines need")
    if config.widths()[0] != config.model_channels:
        allowed = f"a first level of model_channels={config.model_channels} channels: diffusers' timestep"
        raise invalid("channel_mult", config.channel_mult, f"{allowed} embedding has the width of that level")
    if len(config.channel_mult) > 1 and not (config.resblock_updown or config.conv_resample):
        allowed = "True, or resblock_updown: diffusers resamples by convolutions or in residual blocks"
        raise invalid("conv_resample", False, allowed)
    _head_dim(config)


def check_process(process: DiffusionConfig, scheduler: str = "ddim") -> None:
    """Reject a diffusion process that diffusers' scheduler can't represent.

    Raises: InvalidArgument, which names the setting.
    """
    one_of("scheduler", scheduler, SCHEDULERS)
    mean, variance, _ = process.types
    if mean is MeanType.PREVIOUS_X:
        raise invalid("mean_type", mean.name, "EPSILON or START_X: diffusers predicts the noise or x_0")
    if variance is VarType.LEARNED and scheduler == "ddpm":
        allowed = "LEARNED_RANGE or fixed for diffusers' DDPMScheduler; the scheduler ddim has no variance"
        raise invalid("var_type", variance.name, allowed)
    if process.rescale_timesteps and process.steps != 1000:
        allowed = (
            f"False, or 1000 steps: diffusers gives the network integer timesteps, 0 to {process.steps - 1}"
        )
        raise invalid("rescale_timesteps", True, allowed)


def unet_config(config: UNetConfig, scheduler: str = "ddim") -> dict[str, Any]:
    """Return the configuration of the `UNet2DModel` that computes the same as a UNet, ready for JSON.

    scheduler: with "ddim" the network outputs the mean channels only, with "ddpm" the variance channels too.
    Raises: InvalidArgument if the attention heads can't be represented (`check_network` rejects the rest).
    """
    has_attention = config.levels_with_attention()
    block_types = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
    if not config.resblock_updown:
        block_types = ("DownBlock2D", "UpBlock2D")
    resampling = "resnet" if config.resblock_updown else "conv"
    return {
        "_class_name": "UNet2DModel",
        "_diffusers_version": VERSION,
        "sample_size": config.image_size,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels if scheduler == "ddim" else config.out_channels,
        "center_input_sample": False,
        "time_embedding_type": "positional",
        "freq_shift": 0,
        "flip_sin_to_cos": True,
        "down_block_types": [
            "AttnDownBlock2D" if attention else block_types[0] for attention in has_attention
        ],
        "up_block_types": [
            "AttnUpBlock2D" if attention else block_types[1] for attention in reversed(has_attention)
        ],
        "block_out_channels": list(config.widths()),
        "layers_per_block": config.num_res_blocks,
        "downsample_padding": 1,
        "downsample_type": resampling,
        "upsample_type": resampling,
        "dropout": config.dropout,
        "act_fn": "silu",
        "attention_head_dim": _head_dim(config),
        "norm_num_groups": GROUPS,
        # Without this, the middle block's attention has no norm if use_scale_shift_norm is True.
        "attn_norm_num_groups": GROUPS,
        "norm_eps": 1e-5,
        "resnet_time_scale_shift": "scale_shift" if config.use_scale_shift_norm else "default",
        "class_embed_type": None,
        "num_class_embeds": config.num_classes,
    }


def _head_dim(config: UNetConfig) -> int | None:
    """Return the channels of a head, which must be the same in all blocks; None if all have one head."""
    widths = [
        width
        for width, attends in zip(config.widths(), config.levels_with_attention(), strict=True)
        if attends
    ]
    blocks = {(width, config.heads(width, up)) for width in widths for up in (False, True)}
    blocks.add((config.widths()[-1], config.heads(config.widths()[-1])))
    head_dims = {width // heads for width, heads in blocks}
    if len(head_dims) == 1:
        return head_dims.pop()
    if all(heads == 1 for _, heads in blocks):
        return None
    allowed = "heads of one number of channels everywhere (num_head_channels), or one head, in diffusers"
    down_path_dims = {width // config.heads(width) for width, _ in blocks}
    name = "num_heads" if len(down_path_dims) > 1 else "num_heads_upsample"
    raise invalid(name, getattr(config, name), f"{allowed}; here they have {_join_numbers(head_dims)}")


def _join_numbers(numbers: set[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))


def convert_unet_state(
    state: Mapping[str, Tensor], config: UNetConfig, scheduler: str = "ddim"
) -> dict[str, Tensor]:
    """Return the weights of a UNet with the names and shapes of `UNet2DModel`.

    state: the published state dict of a network of `config`, which `check_network` has accepted.
    scheduler: see `unet_config`; with "ddim" the rows of the variance channels are left out.
    The returned tensors may be views.
    """
    converted: dict[str, Tensor] = {}
    for adm_name, diffusers_name in _copied_modules(config):
        for part in ("weight", "bias"):
            if f"{adm_name}.{part}" in state:
                converted[f"{diffusers_name}.{part}"] = state[f"{adm_name}.{part}"]
    for adm_name, diffusers_name, heads in _attention_names(config):
        for part in ("weight", "bias"):
            rows = state[f"{adm_name}.qkv.{part}"]
            if not config.use_new_attention_order:
                rows = rows[legacy_row_order(len(rows), heads)]
            for name, part_rows in zip("qkv", rows.reshape(len(rows), -1).chunk(3), strict=True):
                converted[f"{diffusers_name}.to_{name}.{part}"] = (
                    part_rows if part == "weight" else part_rows.flatten()
                )
        converted[f"{diffusers_name}.to_out.0.weight"] = state[f"{adm_name}.proj_out.weight"].squeeze(-1)
        converted[f"{diffusers_name}.to_out.0.bias"] = state[f"{adm_name}.proj_out.bias"]
    assert len(converted) == len(state) + 4 * sum(key.endswith(".qkv.bias") for key in state)
    if scheduler == "ddim":
        for part in ("weight", "bias"):
            converted[f"conv_out.{part}"] = converted[f"conv_out.{part}"][: config.in_channels]
    return converted


def _copied_modules(config: UNetConfig) -> Iterator[tuple[str, str]]:
    """Yield the ADM and diffusers names of every module whose parameters are copied unchanged."""
    yield from _TOP_LEVEL_LAYERS.items()
    for adm_name, diffusers_name in _block_names(config):
        for inner, name in _RESBLOCK_LAYERS.items():
            yield f"{adm_name}.{inner}", f"{diffusers_name}.{name}"
        yield f"{adm_name}.op", f"{diffusers_name}.conv"  # in a block that only downsamples
        yield f"{adm_name}.conv", f"{diffusers_name}.conv"  # in a block that only upsamples
    for adm_name, diffusers_name, _ in _attention_names(config):
        yield f"{adm_name}.norm", f"{diffusers_name}.group_norm"


def _block_names(config: UNetConfig) -> Iterator[tuple[str, str]]:
    """Yield the ADM and diffusers names of residual blocks and of blocks that resample."""
    count, levels = config.num_res_blocks, len(config.channel_mult)
    has_attention = config.levels_with_attention()
    for level in range(levels):
        first = 1 + level * (count + 1)
        for i in range(count):
            yield f"input_blocks.{first + i}.0", f"down_blocks.{level}.resnets.{i}"
        if level + 1 < levels:
            yield f"input_blocks.{first + count}.0", f"down_blocks.{level}.downsamplers.0"
    for adm_name, i in ((0, 0), (2, 1)):
        yield f"middle_block.{adm_name}", f"mid_block.resnets.{i}"
    for up, attention in enumerate(reversed(has_attention)):
        first = up * (count + 1)
        for i in range(count + 1):
            yield f"output_blocks.{first + i}.0", f"up_blocks.{up}.resnets.{i}"
        if up + 1 < levels:
            yield f"output_blocks.{first + count}.{1 + attention}", f"up_blocks.{up}.upsamplers.0"


def _attention_names(config: UNetConfig) -> Iterator[tuple[str, str, int]]:
    """Yield the ADM and diffusers names of attention blocks, and the number of their heads."""
    count, widths, has_attention = config.num_res_blocks, config.widths(), config.levels_with_attention()
    for level in (level for level, attention in enumerate(has_attention) if attention):
        for i in range(count):
            place = f"input_blocks.{1 + level * (count + 1) + i}.1"
            yield place, f"down_blocks.{level}.attentions.{i}", config.heads(widths[level])
        up = len(widths) - 1 - level
        for i in range(count + 1):
            place = f"output_blocks.{up * (count + 1) + i}.1"
            yield place, f"up_blocks.{up}.attentions.{i}", config.heads(widths[level])
    yield "middle_block.1", "mid_block.attentions.0", config.heads(widths[-1])


def scheduler_config(process: DiffusionConfig, scheduler: str = "ddim") -> dict[str, Any]:
    """Return the configuration of diffusers' scheduler for a process, ready for JSON.

    With N sampling steps, its timesteps are 0, k, 2k, ... with k = process.steps // N ("leading" spacing).
    They are those of `respacing="ddimN"` if N divides process.steps. The last step ends at alpha_bar = 1; x_0
    is clipped to [-1, 1].

    scheduler: "ddim", or "ddpm", whose configuration also has the type of the variance.
    """
    betas: dict[str, Any] = {"beta_schedule": "squaredcos_cap_v2"}
    if process.noise_schedule == "linear":
        first, last = beta_schedule("linear", process.steps)[[0, -1]].tolist()
        betas = {"beta_schedule": "linear", "beta_start": first, "beta_end": last}
    mean, variance, _ = process.types
    variance_names = {
        VarType.LEARNED_RANGE: "learned_range",
        VarType.FIXED_LARGE: "fixed_large",
        VarType.FIXED_SMALL: "fixed_small",
    }
    scheduler_options: dict[str, Any] = {"set_alpha_to_one": True}
    if scheduler == "ddpm":
        scheduler_options = {"variance_type": variance_names[variance]}
    return {
        "_class_name": SCHEDULERS[scheduler][0],
        "_diffusers_version": VERSION,
        "num_train_timesteps": process.steps,
        **betas,
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "prediction_type": "sample" if mean is MeanType.START_X else "epsilon",
        "timestep_spacing": "leading",
        "steps_offset": 0,
        "thresholding": False,
        "rescale_betas_zero_snr": False,
        **scheduler_options,
    }


def model_index(scheduler: str = "ddim") -> dict[str, Any]:
    """Return the content of model_index.json, which names a pipeline's class and its parts."""
    part, pipeline = SCHEDULERS[scheduler]
    return {
        "_class_name": pipeline,
        "_diffusers_version": VERSION,
        "scheduler": ["diffusers", part],
        "unet": ["diffusers", "UNet2DModel"],
    }
