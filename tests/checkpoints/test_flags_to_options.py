"""Tests of published flags given with a weights file: accepted, checked, or answered with our name."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from admfast.checkpoints import flags_to_options, identify, load_network, network_shapes
from admfast.checkpoints.infer import OPTION_NAMES
from admfast.cli.options import parse_settings
from admfast.diffusion import DiffusionConfig
from admfast.errors import CheckpointError, InvalidArgument
from admfast.models import (
    ClassifierConfig,
    classifier_config_from_flags,
    unet_config_from_flags,
    upsampler_config_from_flags,
)
from tests.small import SMALL_UNET
from tests.tools.random_checkpoint import random_state

SHAPES = network_shapes(SMALL_UNET)
ANSWERS = {"image_size": 16, "num_head_channels": 32, "use_new_attention_order": False}
# Flags of the published README and defaults, but with small widths.
MODEL = (
    "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --image_size 64 "
    "--learn_sigma True --noise_schedule cosine --num_channels 32 --num_head_channels 32 --num_heads 4 "
    "--num_res_blocks 1 --resblock_updown True --use_new_attention_order True --use_fp16 True "
    "--use_scale_shift_norm True --num_heads_upsample -1 --dropout 0.1 --use_checkpoint False --use_kl False "
    "--predict_xstart False --rescale_timesteps False --rescale_learned_sigmas False"
)


def pasted(line):
    """Return the options in a line of published flags, parsed as --set parses them."""
    words = line.replace("--", "").split()
    return parse_settings("--set", [f"{a}={b}" for a, b in zip(words[::2], words[1::2], strict=True)])


def published(line, make, *without):
    options = {name: value for name, value in pasted(line).items() if name not in without}
    return make(**options)


PROCESS = (
    "diffusion_steps", "noise_schedule", "use_kl", "predict_xstart", "rescale_timesteps",
    "rescale_learned_sigmas", "use_fp16",
)  # fmt: skip


@pytest.mark.parametrize("multipliers", ["", " --channel_mult 1,2,2"], ids=["default", "given"])
def test_a_pasted_line_of_flags_is_understood(multipliers):
    line = MODEL + multipliers
    config = published(line, unet_config_from_flags, *PROCESS)
    # Sides of 64-pixel images, as factors. As in the published code, a network with few levels never
    # reaches some of them.
    assert config.attention_resolutions == (2, 4, 8)
    info = identify(network_shapes(config), file="x", options=pasted(line))
    levels = {2**level for level in range(len(config.channel_mult))}
    reached = tuple(factor for factor in config.attention_resolutions if factor in levels)
    assert info.config == dataclasses.replace(config, attention_resolutions=reached)
    assert info.diffusion == DiffusionConfig(noise_schedule="cosine", learn_sigma=True)


def test_flags_of_an_upsampler_and_of_a_classifier():
    line = MODEL.replace("--image_size 64", "--large_size 64")
    config = published(f"{line} --small_size 16", upsampler_config_from_flags, *PROCESS)
    found = identify(network_shapes(config), file="x", options={**pasted(line), "kind": "upsampler"}).config
    assert found == config
    line = "--image_size 64 --classifier_width 64 --classifier_depth 1 --classifier_pool attention"
    line += " --classifier_attention_resolutions 32,16,8 --classifier_use_scale_shift_norm True"
    line += " --classifier_resblock_updown True"
    config = published(line, classifier_config_from_flags)
    options = {**pasted(line), "classifier_use_fp16": False, "num_head_channels": 64}
    config = dataclasses.replace(config, num_head_channels=64)
    assert identify(network_shapes(config), file="x", options=options).config == config


@pytest.mark.parametrize(
    "options, named",
    [
        ({"class_cond": False}, "class_cond=False.*num_classes=10"),
        ({"class_cond": "yes"}, "class_cond='yes'"),
        ({"use_fp16": "maybe"}, "^use_fp16='maybe'"),
        ({"attention_resolutions": "16"}, "attention_resolutions='16'.*sides 8.*factors 2"),
        ({"attention_resolutions": (4,)}, "attention_resolutions="),
        ({"attention_resolutions": ""}, "attention_resolutions="),
        ({"channel_mult": "1,x"}, "channel_mult="),
        ({"channel_mult": ""}, "channel_mult=''"),  # there is no default for 16 pixels
        ({"learn_sigma": False}, "learn_sigma=False"),
        ({"num_channels": 32, "model_channels": 32}, "model_channels.*num_channels|same as model_channels"),
        ({"diffusion_steps": 10, "steps": 10}, "the same as steps"),
    ],
    ids=str,
)
def test_what_the_shapes_deny_is_refused(options, named):
    with pytest.raises(InvalidArgument, match=named):
        identify(SHAPES, file="x", options={**ANSWERS, **options})


def test_a_width_that_the_weights_have_not_is_refused():
    with pytest.raises(CheckpointError, match="does not fit"):
        load_network(random_state(SMALL_UNET), **ANSWERS, num_channels=64)


@pytest.mark.parametrize("given", ["8", "32,8", (8,), [2], 2, (2, 64)], ids=str)
def test_attention_is_given_in_pixels_or_in_factors(given):
    found = identify(SHAPES, file="x", options={**ANSWERS, "attention_resolutions": given}).config
    assert found == SMALL_UNET


@pytest.mark.parametrize("flag", sorted(flags_to_options.WHERE_TO_GIVE))
def test_what_is_said_elsewhere_is_told_where(flag):
    (text,) = (flags_to_options.WHERE_TO_GIVE[flag],)
    with pytest.raises(InvalidArgument, match=f"^{flag}=") as caught:
        identify(SHAPES, file="x", options={**ANSWERS, flag: 1})
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_the_table_names_options_that_there_are():
    assert set(flags_to_options.OPTION_OF_FLAG.values()) <= set(OPTION_NAMES)
    assert not flags_to_options.FLAG_NAMES & set(OPTION_NAMES)
    assert flags_to_options.FLAG_SWITCHES <= flags_to_options.FLAG_NAMES


@pytest.mark.parametrize("reverse", [False, True])
def test_a_setting_that_is_given_twice_is_named_with_both_names(reverse):
    given = [("num_channels", 64), ("model_channels", 32)]
    options = dict(reversed(given) if reverse else given)
    with pytest.raises(InvalidArgument, match="^num_channels=64: .*model_channels=32"):
        identify(SHAPES, file="x", options={**options, **ANSWERS})
    options = {"classifier_width": 1, "num_channels": 2}
    with pytest.raises(InvalidArgument, match="^classifier_width=1: .*num_channels=2"):
        identify(SHAPES, file="x", options=options)


@pytest.mark.parametrize(
    "options, named",
    [
        ({"num_channels": 64}, r"num_channels=64 \(it has 32\)"),
        ({"channel_mult": (1, 3)}, r"channel_mult=\(1, 3\) \(it has \(1, 2\)\)"),
        ({"channel_mult": "1,3"}, r"channel_mult='1,3' \(it has \(1, 2\)\)"),
        ({"channel_mult": np.array([1, 3])}, r"channel_mult=.*\(it has \(1, 2\)\)"),
        ({"in_channels": 4}, r"in_channels=4 \(it has 3\)"),
        ({"use_scale_shift_norm": False, "num_classes": 9}, "use_scale_shift_norm=False.*num_classes=9"),
    ],
    ids=str,
)
def test_a_setting_that_the_shapes_contradict_is_named(options, named):
    with pytest.raises(CheckpointError, match=named) as caught:
        load_network(random_state(SMALL_UNET), **ANSWERS, **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


# Values that no option can have; attention is given as text or as numbers.
IMPOSSIBLE = {"attention_resolutions": "16;8", "noise_schedule": "line", "pool": "max", "kind": "gan"}


@pytest.mark.parametrize(
    "flag",
    sorted(
        {*flags_to_options.OPTION_OF_FLAG, *OPTION_NAMES, *flags_to_options.FLAG_SWITCHES}
        - {*flags_to_options.WHERE_TO_GIVE, "entry"}
    ),
)
def test_a_value_that_no_option_has_is_refused_under_the_name_that_gave_it(flag):
    value = IMPOSSIBLE.get(flags_to_options.OPTION_OF_FLAG.get(flag, flag), "x")
    with pytest.raises(InvalidArgument, match=f"^{flag}={value!r}: ") as caught:
        identify(SHAPES, file="x", options={flag: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["1,x", "1,nan", "1,inf", "0,1", "-1,2", "1,,2", "1;2", "x"])
def test_a_text_that_is_no_multipliers_is_shown_whole(text):
    with pytest.raises(InvalidArgument, match=f"^channel_mult='{text}': "):
        identify(SHAPES, file="x", options={**ANSWERS, "channel_mult": text})


@pytest.mark.parametrize(
    "flag, value, has",
    [
        ("num_res_blocks", 3, 1),
        ("classifier_depth", 3, 1),
        ("channel_mult", "1,2,4", (1, 2)),
        ("channel_mult", (1,), (1, 2)),
        ("num_channels", 48, 32),
        ("classifier_width", 31, 32),
    ],
)
def test_a_setting_of_which_no_network_can_be_made_is_named_beside_what_the_weights_have(flag, value, has):
    for more in ({}, {"conv_resample": False}):  # conv_resample has no effect here, so it must not be blamed
        with pytest.raises(InvalidArgument) as caught:
            identify(SHAPES, file="x", options={**ANSWERS, **more, flag: value})
        assert str(caught.value).startswith(f"{flag}={value!r}: ") and str(caught.value).endswith(f" {has}")


@pytest.mark.parametrize(
    "options, named",
    [
        ({"classifier_depth": 5}, "^classifier_depth=5: .*7 on 1 level,.*3 on 2 levels.*1 on 4 levels"),
        ({"channel_mult": "1,1,1"}, "^channel_mult='1,1,1': .*on 4 levels"),
        (
            {"num_res_blocks": 3, "channel_mult": (1, 1, 1, 1)},
            "^channel_mult=\\(1, 1, 1, 1\\): .*3 on 2 levels",
        ),
        ({"num_res_blocks": 3, "large_size": 24}, "^large_size=24: .*image_size 8"),
    ],
    ids=str,
)
def test_the_option_that_no_reading_of_the_blocks_allows_is_named(options, named):
    """Eight equal blocks can be read as 1, 2 or 4 levels."""
    config = ClassifierConfig(
        image_size=32,
        model_channels=32,
        out_channels=4,
        num_res_blocks=1,
        attention_resolutions=(),
        channel_mult=(1, 1, 1, 1),
        num_head_channels=32,
        resblock_updown=True,
        pool="attention",
    )
    with pytest.raises(InvalidArgument, match=named) as caught:
        identify(network_shapes(config), file="x", options={"num_head_channels": 32, **options})
    assert "{" not in str(caught.value)


def test_an_option_of_another_kind_is_refused_by_name():
    for options in ({"pool": "spatial"}, {"classifier_pool": "spatial"}):
        (flag,) = options
        for how in ({"options": {**ANSWERS, **options}}, {"options": options, "config": SMALL_UNET}):
            with pytest.raises(InvalidArgument, match=f"^{flag}='spatial': .*unet"):
                identify(SHAPES, file="x", **how)
