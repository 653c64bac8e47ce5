"""Tests of the published scripts' flags for a network: equal to the README's, or refused if none exist."""

from __future__ import annotations

import dataclasses

import pytest

from admfast.checkpoints import identify, network_shapes
from admfast.checkpoints.config_to_flags import published_flags
from admfast.diffusion import DiffusionConfig
from admfast.errors import InvalidArgument
from admfast.models import ClassifierConfig, UNetConfig, UpsamplerConfig
from admfast.models.presets import MODELS
from tests.small import SMALL_CLASSIFIER, SMALL_UNET, SMALL_UPSAMPLER

# Flags of the published README without those of the computation; below, the defaults of the other flags.
README = {
    "64x64_diffusion": "attention_resolutions 32,16,8 class_cond True diffusion_steps 1000 dropout 0.1 "
    "image_size 64 learn_sigma True noise_schedule cosine num_channels 192 num_head_channels 64 "
    "num_res_blocks 3 resblock_updown True use_new_attention_order True use_scale_shift_norm True",
    "512x512_diffusion": "attention_resolutions 32,16,8 class_cond True diffusion_steps 1000 image_size 512 "
    "learn_sigma True noise_schedule linear num_channels 256 num_head_channels 64 num_res_blocks 2 "
    "resblock_updown True use_scale_shift_norm True",
    "64_256_upsampler": "attention_resolutions 32,16,8 class_cond True diffusion_steps 1000 large_size 256 "
    "small_size 64 learn_sigma True noise_schedule linear num_channels 192 num_heads 4 num_res_blocks 2 "
    "resblock_updown True use_scale_shift_norm True",
    "64x64_classifier": "image_size 64 classifier_attention_resolutions 32,16,8 classifier_depth 4 "
    "classifier_width 128 classifier_pool attention classifier_resblock_updown True "
    "classifier_use_scale_shift_norm True",
}
DEFAULTS = {
    "num_heads": "4", "num_heads_upsample": "-1", "num_head_channels": "-1", "dropout": "0.0",
    "channel_mult": "", "use_new_attention_order": "False", "use_kl": "False", "predict_xstart": "False",
    "rescale_timesteps": "False", "rescale_learned_sigmas": "False",
}  # fmt: skip
PUBLISHED: UNetConfig = dataclasses.replace(SMALL_UNET, num_classes=1000)


@pytest.mark.parametrize("name", README)
def test_released_models_have_the_flags_of_the_published_readme(name):
    model = MODELS[name]
    words = README[name].split()
    wanted = dict(zip(words[::2], words[1::2], strict=True))
    found = published_flags(model.config, model.diffusion, model.low_res_size)
    assert {flag: str(value) for flag, value in found.items()} == {
        **{flag: value for flag, value in DEFAULTS.items() if flag in found},
        **wanted,
    }


@pytest.mark.parametrize(
    "changes",
    [{}, {"channel_mult": (1, 2, 3), "attention_resolutions": (2, 4)}, {"attention_resolutions": ()}],
    ids=["one-level-attends", "two-levels-attend", "none-attends"],
)
def test_flags_lead_back_to_the_network(changes):
    config = dataclasses.replace(PUBLISHED, **changes)
    process = DiffusionConfig(noise_schedule="cosine", steps=500, learn_sigma=True, use_kl=True)
    found = published_flags(config, process)
    info = identify(network_shapes(config), file="x", options=found, require_process=True)
    assert info.config == config and info.diffusion == process


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (dataclasses.replace(PUBLISHED, in_channels=1, out_channels=2), "in_channels"),
        (dataclasses.replace(PUBLISHED, out_channels=5), "out_channels"),
        (dataclasses.replace(PUBLISHED, num_classes=10), "num_classes"),
        (dataclasses.replace(PUBLISHED, dims=1), "dims"),
        (dataclasses.replace(PUBLISHED, model_channels=64, channel_mult=(1.5, 2)), "channel_mult"),
        (dataclasses.replace(PUBLISHED, resblock_updown=False, conv_resample=False), "conv_resample"),
        (dataclasses.replace(PUBLISHED, image_size=20, channel_mult=(1,) * 4, attention_resolutions=(8,)),
         "attention_resolutions"),
        (UpsamplerConfig(**{**dataclasses.asdict(SMALL_UPSAMPLER)}), "image_size"),
        (dataclasses.replace(MODELS["64_256_upsampler"].config, use_new_attention_order=True),
         "use_new_attention_order"),
        (SMALL_CLASSIFIER, "image_size"),
        (ClassifierConfig(**{**dataclasses.asdict(MODELS["64x64_classifier"].config), "out_channels": 10}),
         "out_channels"),
        (dataclasses.replace(MODELS["64x64_classifier"].config, num_head_channels=32), "num_head_channels"),
    ],
)  # fmt: skip
def test_networks_that_no_flags_build(config, field):
    with pytest.raises(InvalidArgument, match=f"^{field}="):
        published_flags(config)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"mean_type": "PREVIOUS_X"}, "mean_type"),
        ({"var_type": "FIXED_SMALL"}, "var_type"),
        ({"loss_type": "KL"}, "loss_type"),
    ],
)
def test_processes_that_no_flags_say(settings, field):
    config = dataclasses.replace(PUBLISHED, out_channels=3)
    with pytest.raises(InvalidArgument, match=f"^{field}="):
        published_flags(config, DiffusionConfig(**settings))


def test_what_has_no_effect_needs_no_flag():
    """num_heads has no effect with num_head_channels, nor has conv_resample with resblock_updown."""
    config = dataclasses.replace(PUBLISHED, conv_resample=False)
    assert published_flags(config) == published_flags(PUBLISHED)
    classifier = MODELS["64x64_classifier"].config
    assert published_flags(dataclasses.replace(classifier, num_heads=4)) == published_flags(classifier)
