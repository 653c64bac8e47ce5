"""Tests of a UNet's weights and process in diffusers' form, against diffusers' network in plain PyTorch."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from admfast.checkpoints import diffusers
from admfast.diffusion import DiffusionConfig
from admfast.errors import InvalidArgument
from admfast.models import UNetConfig
from admfast.models.presets import MODELS
from tests.checkpoints.exported import HELD, assert_same_output, held, inputs
from tests.checkpoints.plain_unet2d import PlainUNet2D
from tests.small import SMALL_CLASSIFIER, SMALL_UNET, SMALL_UPSAMPLER, with_weights


def changed(**changes) -> UNetConfig:
    return dataclasses.replace(SMALL_UNET, **changes)


@pytest.mark.parametrize("name", HELD)
def test_the_network_computes_the_same(name):
    config = held(name)
    net = with_weights(config).double()
    x, t, classes = inputs(config)
    wanted = net(x, t, classes)
    for scheduler, channels in (("ddpm", config.out_channels), ("ddim", config.in_channels)):
        settings = diffusers.unet_config(config, scheduler)
        assert settings["out_channels"] == channels
        theirs = PlainUNet2D(settings, diffusers.convert_unet_state(net.state_dict(), config, scheduler))
        assert_same_output(theirs(x, t, classes), wanted[:, :channels])


def test_rows_of_qkv_are_permuted_and_nothing_is_computed():
    """Each value is the number of its row, which shows where each row goes."""
    heads, dim = 2, 32
    state = with_weights(SMALL_UNET).state_dict()
    rows = torch.arange(3 * heads * dim, dtype=torch.float32)
    state["middle_block.1.qkv.bias"] = rows
    state["middle_block.1.qkv.weight"] = rows[:, None, None].expand(-1, heads * dim, 1)
    for order, start in ((False, lambda part, head: (3 * head + part) * dim), (True, None)):
        config = changed(use_new_attention_order=order)
        found = diffusers.convert_unet_state(state, config)
        for part, name in enumerate("qkv"):
            wanted = []
            for head in range(heads):
                first = start(part, head) if start else (heads * part + head) * dim
                wanted += range(first, first + dim)
            assert found[f"mid_block.attentions.0.to_{name}.bias"].tolist() == wanted
            assert found[f"mid_block.attentions.0.to_{name}.weight"][:, 0].tolist() == wanted
    values = {key: value.flatten().sort().values for key, value in state.items()}
    for key, value in diffusers.convert_unet_state(state, SMALL_UNET, "ddpm").items():
        if ".to_" not in key:
            assert any(torch.equal(value.flatten().sort().values, whole) for whole in values.values()), key


def test_every_value_has_one_place():
    state = with_weights(SMALL_UNET).state_dict()
    whole = diffusers.convert_unet_state(state, SMALL_UNET, "ddpm")
    assert sum(value.numel() for value in whole.values()) == sum(value.numel() for value in state.values())
    assert diffusers.convert_unet_state(state, SMALL_UNET)["conv_out.weight"].shape == (3, 32, 3, 3)
    assert diffusers.convert_unet_state(state, SMALL_UNET)["conv_out.bias"].shape == (3,)


def test_the_configuration_of_a_released_network():
    """64x64_diffusion: widths 192 x (1, 2, 3, 4), attention at sides 32, 16 and 8, heads of 64 channels."""
    config = MODELS["64x64_diffusion"].config
    diffusers.check_network(config)
    settings = diffusers.unet_config(config)
    assert settings["down_block_types"] == ["ResnetDownsampleBlock2D"] + ["AttnDownBlock2D"] * 3
    assert settings["up_block_types"] == ["AttnUpBlock2D"] * 3 + ["ResnetUpsampleBlock2D"]
    wanted = {
        "sample_size": 64, "in_channels": 3, "out_channels": 3, "block_out_channels": [192, 384, 576, 768],
        "layers_per_block": 3, "attention_head_dim": 64, "num_class_embeds": 1000, "dropout": 0.1,
        "resnet_time_scale_shift": "scale_shift", "downsample_type": "resnet", "upsample_type": "resnet",
        "norm_num_groups": 32, "attn_norm_num_groups": 32, "norm_eps": 1e-5, "freq_shift": 0,
        "flip_sin_to_cos": True, "center_input_sample": False,
    }  # fmt: skip
    assert {name: settings[name] for name in wanted} == wanted


def test_released_models_that_are_held():
    """Not representable: four heads at every width, a narrow first level, upsamplers, classifiers."""
    held_names = set()
    for name, model in MODELS.items():
        try:
            diffusers.check_network(model.config)
        except InvalidArgument:
            continue
        held_names.add(name)
    lsun = {"lsun_bedroom", "lsun_cat", "lsun_horse", "lsun_horse_nodropout"}
    uncond = {"256x256_diffusion_uncond"}
    assert held_names == {"64x64_diffusion", "256x256_diffusion", "digits32_diffusion"} | uncond | lsun


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (SMALL_CLASSIFIER, "kind", "classifier"),
        (SMALL_UPSAMPLER, "kind", "upsampler"),
        (changed(dims=1), "dims", "1"),
        (changed(dims=3), "dims", "3"),
        (changed(out_channels=4), "out_channels", "4"),
        (changed(channel_mult=(0.5, 1), model_channels=64), "channel_mult", "0.5"),
        (changed(channel_mult=(2, 2)), "channel_mult", "2"),
        (changed(resblock_updown=False, conv_resample=False), "conv_resample", "False"),
        (changed(num_head_channels=-1, num_heads=4, attention_resolutions=(1,)), "num_heads", "4"),
        (
            changed(num_head_channels=-1, num_heads=2, num_heads_upsample=4),
            "num_heads_upsample",
            "4",
        ),
    ],
)
def test_networks_that_are_refused(config, field, value):
    with pytest.raises(InvalidArgument, match=f"^{field}=.*{value}") as caught:
        diffusers.check_network(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "scheduler", "field"),
    [
        ({"mean_type": "PREVIOUS_X"}, "ddim", "mean_type"),
        ({"var_type": "LEARNED"}, "ddpm", "var_type"),
        ({"rescale_timesteps": True, "steps": 4000}, "ddim", "rescale_timesteps"),
        ({}, "unipc", "scheduler"),
    ],
)
def test_processes_that_are_refused(settings, scheduler, field):
    with pytest.raises(InvalidArgument, match=f"^{field}="):
        diffusers.check_process(DiffusionConfig(**settings), scheduler)


def test_processes_that_are_held():
    diffusers.check_process(DiffusionConfig(rescale_timesteps=True))  # the factor is 1000 / 1000 = 1
    diffusers.check_process(DiffusionConfig(var_type="LEARNED"), "ddim")  # DDIM uses no variance


@pytest.mark.parametrize("steps", [1000, 100, 4000])
def test_linear_schedules_are_scaled_to_their_steps(steps):
    settings = diffusers.scheduler_config(DiffusionConfig(steps=steps))
    assert (settings["beta_schedule"], settings["num_train_timesteps"]) == ("linear", steps)
    assert math.isclose(settings["beta_start"], 0.1 / steps) and math.isclose(
        settings["beta_end"], 20 / steps
    )


def test_settings_of_the_schedulers():
    ddim = diffusers.scheduler_config(DiffusionConfig(noise_schedule="cosine", learn_sigma=True))
    wanted = {
        "_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2", "prediction_type": "epsilon",
        "timestep_spacing": "leading", "steps_offset": 0, "set_alpha_to_one": True, "clip_sample": True,
        "clip_sample_range": 1.0, "thresholding": False, "rescale_betas_zero_snr": False,
    }  # fmt: skip
    assert {name: ddim[name] for name in wanted} == wanted and "variance_type" not in ddim
    assert diffusers.scheduler_config(DiffusionConfig(predict_xstart=True))["prediction_type"] == "sample"
    kinds = {"learned_range": {"learn_sigma": True}, "fixed_large": {}, "fixed_small": {"sigma_small": True}}
    for kind, switches in kinds.items():
        ddpm = diffusers.scheduler_config(DiffusionConfig(**switches), "ddpm")
        assert (ddpm["_class_name"], ddpm["variance_type"]) == ("DDPMScheduler", kind)
        assert diffusers.model_index("ddpm")["_class_name"] == "DDPMPipeline"
