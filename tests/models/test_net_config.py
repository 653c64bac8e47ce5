"""Tests of network configurations: allowed values, errors for others, and the published flags."""

from __future__ import annotations

import dataclasses

import pytest

from admfast.errors import InvalidArgument
from admfast.models import (
    ClassifierConfig,
    UNetConfig,
    UpsamplerConfig,
    classifier_config_from_flags,
    config_from_dict,
    unet_config_from_flags,
    upsampler_config_from_flags,
)
from tests.small import CLASSIFIER, UNET, UPSAMPLER

FLAGS = {"image_size": 64, "num_channels": 64, "num_res_blocks": 2}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image_size": 0}, "image_size=0: a whole number"),
        ({"in_channels": 1.0}, "in_channels=1.0: a whole number"),
        ({"num_res_blocks": True}, "num_res_blocks=True: a whole number"),
        ({"dims": 4}, "dims=4: "),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dropout": float("nan")}, "dropout=nan"),
        ({"channel_mult": ()}, r"channel_mult=\(\)"),
        ({"channel_mult": (1, 0.25)}, r"every level's width must be a multiple of 32; 0.25 \* 32 gives 8"),
        ({"channel_mult": (-1,)}, "channel_mult=-1"),
        ({"model_channels": 33}, r"must be a multiple of 32; 1 \* 33 gives 33"),
        ({"num_heads": 3}, "num_heads=3: must divide 64 channels"),
        ({"num_heads": 0}, "num_heads=0: a whole number"),
        ({"num_heads_upsample": 5}, "num_heads_upsample=5: must divide 64 channels"),
        ({"num_head_channels": 48}, "num_head_channels=48: -1, or a divisor of 64"),
        ({"num_classes": 0}, "num_classes=0: a whole number"),
        ({"num_classes": "ten"}, "num_classes='ten': a whole number"),
        ({"num_heads": 1.5}, "num_heads=1.5: a whole number"),
        ({"num_head_channels": "x"}, "num_head_channels='x': a whole number"),
        ({"dims": 2.0}, "dims=2.0: "),
        ({"dropout": "abc"}, "dropout='abc'"),
        ({"dropout": True}, "dropout=True"),
        ({"channel_mult": "1,2"}, "channel_mult='1,2'"),
        ({"channel_mult": (1, "x")}, "channel_mult='x'"),
        ({"attention_resolutions": "x"}, "attention_resolutions='x'"),
        ({"attention_resolutions": (2, 0.5)}, "attention_resolutions=0.5"),
        ({"use_new_attention_order": "no"}, "use_new_attention_order='no': True or False"),
        ({"resblock_updown": 1}, "resblock_updown=1: True or False"),
        ({"use_checkpoint": None}, "use_checkpoint=None: True or False"),
    ],
)
def test_what_is_not_allowed_is_named_with_what_is(changes, message):
    with pytest.raises(InvalidArgument, match=message) as caught:
        UNetConfig(**{**UNET, **changes})
    assert "\n" not in str(caught.value)


def test_an_upsampler_puts_out_images_and_a_unet_anything():
    with pytest.raises(InvalidArgument, match="out_channels=3: 1 or, with learned variance, 2"):
        UpsamplerConfig(**{**UNET, "out_channels": 3})
    wider = UNetConfig(**{**UNET, "in_channels": 4, "out_channels": 2})
    assert not wider.outputs_images and not wider.learn_sigma
    assert all(UNetConfig(**{**UNET, "out_channels": count}).outputs_images for count in (1, 2))


def test_one_factor_or_multiplier_needs_no_sequence():
    config = UNetConfig(**{**UNET, "attention_resolutions": 1, "channel_mult": 2})
    assert (config.attention_resolutions, config.channel_mult) == ((1,), (2,))
    assert UNetConfig(**{**UNET, "attention_resolutions": [2]}).attention_resolutions == (2,)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"pool": "attn"}, "pool='attn': nearest: attention"),
        ({"num_head_channels": -1}, "num_head_channels=-1: the attention pool needs the channels of a head"),
        ({"dims": 1}, "pool='attention': with dims other than 2: 'spatial' or 'spatial_v2'"),
    ],
)
def test_what_a_classifier_does_not_allow(changes, message):
    with pytest.raises(InvalidArgument, match=message):
        ClassifierConfig(**{**CLASSIFIER, **changes})


def test_heads_are_checked_where_there_is_attention():
    # The second level, of 96 channels, has no attention, so 64 heads need not divide 96.
    config = UNetConfig(**{**UNET, "channel_mult": (1, 3, 2), "attention_resolutions": (4,), "num_heads": 64})
    assert config.heads(64) == 64
    with pytest.raises(InvalidArgument, match="num_heads=64: must divide 96 channels"):
        dataclasses.replace(config, attention_resolutions=(2, 4))


def test_what_follows_from_a_configuration():
    config = UNetConfig(**{**UNET, "model_channels": 64, "channel_mult": (0.5, 1, 2)})
    assert config.widths() == (32, 64, 128)
    assert config.levels_with_attention() == (False, True, False)
    assert config.learn_sigma and not dataclasses.replace(config, out_channels=1).learn_sigma
    assert (config.heads(64), config.heads(64, up_path=True)) == (2, 2)
    assert dataclasses.replace(config, num_heads_upsample=8).heads(64, up_path=True) == 8
    by_width = dataclasses.replace(config, num_head_channels=16, num_heads_upsample=8)
    assert (by_width.heads(64), by_width.heads(64, up_path=True)) == (4, 4)
    assert ClassifierConfig(**{**CLASSIFIER, "channel_mult": (1, 1, 2)}).pool_downsampling() == 4


@pytest.mark.parametrize(
    "config",
    [UNetConfig(**UNET), UpsamplerConfig(**UPSAMPLER), ClassifierConfig(**CLASSIFIER)],
    ids=lambda config: config.kind,
)
def test_dictionaries_and_back(config):
    fields = config.to_dict()
    assert fields["kind"] == config.kind == next(iter(fields.values()))
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    assert config_from_dict(fields) == config_from_dict(listed) == config
    with pytest.raises(InvalidArgument, match="config='num_head': no such field .* nearest: num_heads"):
        config_from_dict({**fields, "num_head": 2})
    with pytest.raises(InvalidArgument, match="config='image_size': .* needs this field"):
        config_from_dict({name: value for name, value in fields.items() if name != "image_size"})
    with pytest.raises(InvalidArgument, match="kind='unit': nearest: unet"):
        config_from_dict({**fields, "kind": "unit"})


# Flags


@pytest.mark.parametrize(
    "size, multipliers",
    [(64, (1, 2, 3, 4)), (128, (1, 1, 2, 3, 4)), (256, (1, 1, 2, 2, 4, 4)), (512, (0.5, 1, 1, 2, 2, 4, 4))],
)
def test_default_multipliers(size, multipliers):
    assert unet_config_from_flags(**{**FLAGS, "image_size": size}).channel_mult == multipliers
    assert classifier_config_from_flags(image_size=size).channel_mult == multipliers
    large = upsampler_config_from_flags(large_size=size, small_size=32, num_channels=64, num_res_blocks=1)
    assert large.channel_mult == ((1, 1, 2, 2, 4, 4) if size == 512 else multipliers)


def test_flags_of_a_unet():
    config = unet_config_from_flags(
        **FLAGS, channel_mult="0.5, 1,2", attention_resolutions="32,16", learn_sigma=True, num_heads=4
    )
    assert config.channel_mult == (0.5, 1, 2) and isinstance(config.channel_mult[1], int)
    assert config.attention_resolutions == (2, 4)
    assert (config.out_channels, config.num_classes, config.num_heads) == (6, None, 4)
    config = unet_config_from_flags(**FLAGS, class_cond=True, num_classes=7, in_channels=5)
    assert (config.num_classes, config.in_channels, config.out_channels) == (7, 5, 5)
    assert unet_config_from_flags(**FLAGS, class_cond=True).num_classes == 1000
    assert unet_config_from_flags(**FLAGS, attention_resolutions="").attention_resolutions == ()
    assert unet_config_from_flags(**FLAGS, attention_resolutions=[32]).attention_resolutions == (2,)
    assert unet_config_from_flags(**FLAGS, channel_mult=[1, 2]).channel_mult == (1, 2)


def test_flags_of_the_others():
    config = upsampler_config_from_flags(
        large_size=64, small_size=16, num_channels=64, num_res_blocks=1, class_cond=True, num_classes=3
    )
    assert isinstance(config, UpsamplerConfig)
    assert (config.image_size, config.in_channels, config.num_classes) == (64, 3, 3)
    config = classifier_config_from_flags(
        image_size=64, num_classes=10, in_channels=1, classifier_pool="spatial"
    )
    assert (config.out_channels, config.in_channels, config.pool) == (10, 1, "spatial")
    assert (config.num_head_channels, config.use_new_attention_order) == (64, False)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"channel_mult": "1,x"}, "channel_mult='1,x': "),
        ({"image_size": 48}, r"channel_mult='': no default for image size 48 \(there is one for \[64, 128"),
        ({"attention_resolutions": "16;8"}, "attention_resolutions='16;8': image sides separated by commas"),
        ({"attention_resolutions": "16,0"}, "attention_resolutions='16,0': image sides of 1 or more"),
    ],
)
def test_flags_that_cant_be_read_are_named(changes, message):
    with pytest.raises(InvalidArgument, match=message):
        unet_config_from_flags(**{**FLAGS, **changes})


@pytest.mark.parametrize("small", [0, 65])
def test_an_upsampler_enlarges(small):
    with pytest.raises(InvalidArgument, match=f"small_size={small}: 1 to large_size=64"):
        upsampler_config_from_flags(large_size=64, small_size=small, num_channels=64, num_res_blocks=1)
