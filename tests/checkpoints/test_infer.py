"""Tests of inferring a configuration from shapes, presets, descriptions and options, and of what it asks."""

from __future__ import annotations

import dataclasses
import math
import random
import re

import pytest

from admfast.checkpoints import (
    AmbiguousCheckpoint,
    compare,
    fingerprint,
    identify,
    nearest_preset,
    network_shapes,
)
from admfast.checkpoints.structure import read_structure
from admfast.diffusion import DiffusionConfig
from admfast.errors import AdmfastError, CheckpointError, InvalidArgument
from admfast.models import ClassifierConfig, NetConfig, UNetConfig, UpsamplerConfig
from admfast.models.description import Description
from admfast.models.presets import preset
from tests.small import SMALL_CLASSIFIER, SMALL_NETS, SMALL_UNET, SMALL_UPSAMPLER

HEADS = {"num_head_channels": 32, "use_new_attention_order": False}


def hidden_options(config):
    """Return the options that no shape reveals."""
    names = ["dropout", "num_heads", "num_head_channels", "use_new_attention_order", "image_size", "kind"]
    return {name: getattr(config, name) for name in names}


def without_effect(config):
    """Return `config` with options that have no effect set to their defaults."""
    changes = {}
    if len(config.channel_mult) == 1:
        changes |= {"resblock_updown": False, "conv_resample": True}
    elif config.resblock_updown:
        changes["conv_resample"] = True
    return dataclasses.replace(config, **changes)


@pytest.mark.parametrize("seed", range(120))
def test_any_network_is_recognised(seed):
    config = random_config(seed)
    shapes = network_shapes(config)
    options = hidden_options(config)
    if len(read_structure(shapes).layouts) > 1:
        assert isinstance(config, ClassifierConfig)  # a UNet's up path shows where levels end
        with pytest.raises(AmbiguousCheckpoint, match="num_res_blocks"):
            identify(shapes, file="x", options={**options, "image_size": None})
        options["num_res_blocks"] = config.num_res_blocks
    found = identify(shapes, file="x", options=options).config
    expected = without_effect(config)
    for mine, theirs in zip(found.channel_mult, expected.channel_mult, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-8)
    assert dataclasses.replace(found, channel_mult=expected.channel_mult) == expected
    assert network_shapes(found) == shapes


def test_a_multiplier_that_rounds_down_still_gives_the_width():
    assert int(480 / 352 * 352) == 479
    config = dataclasses.replace(
        SMALL_UNET, model_channels=352, channel_mult=(1, math.nextafter(480 / 352, math.inf))
    )
    found = identify(network_shapes(config), file="x", options={"image_size": 16, **HEADS}).config
    assert found.widths() == (352, 480) and found == config


def test_the_random_networks_reach_every_option():
    """The random networks cover every kind, pool and way of resampling."""
    configs = [random_config(seed) for seed in range(120)]
    assert {config.kind for config in configs} == {"unet", "upsampler", "classifier"}
    assert {c.pool for c in configs if c.kind == "classifier"} == {
        "adaptive",
        "attention",
        "spatial",
        "spatial_v2",
    }
    assert {(c.resblock_updown, c.conv_resample) for c in configs} == {
        (a, b) for a in (True, False) for b in (True, False)
    }
    assert {c.dims for c in configs} == {1, 2, 3}
    assert {len(c.channel_mult) for c in configs} == {1, 2, 3, 4}
    assert any(c.in_channels * 2 == c.out_channels and c.kind == "upsampler" for c in configs)


def test_the_question_lists_what_is_open_and_what_is_allowed():
    with pytest.raises(AmbiguousCheckpoint) as caught:
        identify(network_shapes(SMALL_UNET), file="runs/a.pt")
    text = str(caught.value)
    assert text.startswith("runs/a.pt: these are the weights of a unet with 32 base channels x (1,2)")
    assert "num_heads or num_head_channels (a divisor of 64)" in text
    assert "use_new_attention_order (True or False)" in text
    assert "image_size (side of the training images in pixels)" in text
    assert "kind" not in text and "num_res_blocks" not in text and "\n" not in text
    assert set(caught.value.structure.kinds) == {"unet"}


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({"image_size": 16}, {"num_heads", "use_new_attention_order", "noise_schedule"}),
        ({"image_size": 16, "num_heads": 2}, {"use_new_attention_order", "noise_schedule"}),
        ({"image_size": 16, "num_heads": 1}, set()),  # with one head both orders are the same
        ({"image_size": 16, "num_head_channels": 64}, set()),
        ({"num_heads": 1}, {"image_size", "noise_schedule"}),
        (HEADS, {"image_size", "noise_schedule"}),
        ({"noise_schedule": "linear", **HEADS}, {"image_size"}),
    ],
    ids=lambda value: str(sorted(value)),  # sorted, so that ids are the same in every process
)
def test_an_option_that_is_given_is_not_asked_for(options, asked):
    shapes = network_shapes(SMALL_UNET)
    if not asked:
        assert identify(shapes, file="x", options=options).config.image_size == 16
        return
    with pytest.raises(AmbiguousCheckpoint) as caught:
        identify(shapes, file="x", options=options)
    question = str(caught.value).partition("give ")[2].partition("; or put its .json")[0]
    assert set(re.findall(r"(?:^|; )(\w+)", question)) == asked


def test_channels_that_fit_two_kinds_are_asked_about():
    shapes = network_shapes(SMALL_UPSAMPLER)  # 2 channels in (1 and its low-resolution copy), 2 out
    options = {"image_size": 16, "num_heads": 2, "use_new_attention_order": False}
    with pytest.raises(AmbiguousCheckpoint, match=r"kind \(unet or upsampler\)"):
        identify(shapes, file="x", options=options)
    as_upsampler = identify(shapes, file="x", options={**options, "kind": "upsampler"}).config
    assert as_upsampler == SMALL_UPSAMPLER
    as_unet = identify(shapes, file="x", options={**options, "kind": "unet"}).config
    assert isinstance(as_unet, UNetConfig) and as_unet.kind == "unet" and as_unet.in_channels == 2


@pytest.mark.parametrize("stem, head", [(4, 2), (6, 3), (8, 4)])
def test_a_condition_in_the_input_is_not_taken_for_an_upsampler_s(stem, head):
    """An image concatenated with a condition can have the channels of an upsampler."""
    given = dataclasses.replace(SMALL_UNET, in_channels=stem, out_channels=head)
    options = {"image_size": 16, "num_classes": 10, **HEADS}
    with pytest.raises(AmbiguousCheckpoint, match=r"kind \(unet or upsampler\)"):
        identify(network_shapes(given), file="x", options=options)
    found = identify(network_shapes(given), file="x", options={**options, "kind": "unet"}).config
    assert found == given and not found.outputs_images
    up = identify(network_shapes(given), file="x", options={**options, "kind": "upsampler"}).config
    assert up.kind == "upsampler" and up.in_channels == stem // 2


def test_a_network_of_any_channels_is_a_unet():
    given = dataclasses.replace(SMALL_UNET, in_channels=5, out_channels=1)
    assert identify(network_shapes(given), file="x", options={"image_size": 16, **HEADS}).config == given


def test_an_attention_pool_shows_the_image_size():
    found = identify(network_shapes(SMALL_CLASSIFIER), file="x", options={"num_head_channels": 32})
    assert found.config == SMALL_CLASSIFIER
    assert found.assumed == (
        "dropout=0.0 (matters in training only)",
        "use_new_attention_order=False (as in every published classifier)",
    )


def test_a_classifier_of_equal_blocks_can_be_read_in_several_ways():
    equal = dataclasses.replace(
        SMALL_CLASSIFIER, channel_mult=(1, 1, 1), attention_resolutions=(), num_res_blocks=3
    )
    shapes = network_shapes(equal)  # 12 input blocks: 1x11, 2x5, 3x3, 4x2 or 6x1
    options = {"num_head_channels": 32}
    with pytest.raises(AmbiguousCheckpoint, match=r"num_res_blocks \(11, 5, 3, 2 or 1\)"):
        identify(shapes, file="x", options=options)
    for answer in ({"num_res_blocks": 3}, {"image_size": 16}, {"channel_mult": (1, 1, 1)}):
        assert identify(shapes, file="x", options={**options, **answer}).config == equal
    with pytest.raises(InvalidArgument, match="num_res_blocks 3 on 3 levels, image_size 16"):
        identify(shapes, file="x", options={**options, "num_res_blocks": 4})


def test_what_the_file_carries_answers_and_options_win():
    stored = Description(SMALL_UNET, DiffusionConfig(steps=100, learn_sigma=True), {"seed": 3})
    given = identify(
        network_shapes(SMALL_UNET), file="x", config=SMALL_UNET, options={"noise_schedule": "cosine"}
    )
    assert given.diffusion == DiffusionConfig(noise_schedule="cosine", learn_sigma=True)
    found = identify(network_shapes(SMALL_UNET), file="x", description=stored)
    assert (found.config, found.diffusion, found.training) == (SMALL_UNET, stored.diffusion, {"seed": 3})
    assert found.preset is None and found.candidates == () and found.assumed == ()
    changed = identify(
        network_shapes(SMALL_UNET),
        file="x",
        description=stored,
        options={"num_heads": 4, "num_head_channels": -1, "steps": 50},
    )
    assert changed.config == dataclasses.replace(SMALL_UNET, num_heads=4, num_head_channels=-1)
    assert changed.diffusion == dataclasses.replace(stored.diffusion, steps=50)


def test_the_process_of_unknown_weights_is_unknown_unless_given():
    options = {"image_size": 16, **HEADS}
    assert identify(network_shapes(SMALL_UNET), file="x", options=options).diffusion is None
    found = identify(network_shapes(SMALL_UNET), file="x", options={**options, "noise_schedule": "cosine"})
    assert found.diffusion == DiffusionConfig(noise_schedule="cosine", learn_sigma=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"options": {"num_head": 4}}, "option='num_head': nearest: num_heads"),
        ({"options": {"noise_shedule": "linear"}}, "nearest: noise_schedule"),
        ({"options": {"kind": "gan"}}, "kind='gan'"),
        ({"options": {"kind": "classifier", "image_size": 16, **HEADS}}, "those of a unet"),
        ({"options": {"num_heads": 3, "image_size": 16}}, "num_heads=3: must divide"),
        ({"options": {"num_heads": "four", "image_size": 16}}, "num_heads='four': a whole number"),
        (
            {"options": {**HEADS, "image_size": 16, "learn_sigma": False}},
            "learn_sigma=False: True for a network",
        ),
        ({"config": SMALL_UNET, "options": {"learn_sigma": False}}, "learn_sigma=False: True for a network"),
        (
            {"description": Description(SMALL_UNET, DiffusionConfig())},
            "learn_sigma=False: True for a network",
        ),
        ({"options": {"channel_mult": 5, **HEADS}}, "channel_mult=5: "),
        ({"options": {"attention_resolutions": "x"}}, "attention_resolutions='x'"),
        ({"options": {"num_head_channels": "x"}}, "num_head_channels='x': a whole number"),
        ({"options": {"use_new_attention_order": "no"}}, "use_new_attention_order='no': True or False"),
        ({"options": {"dropout": "abc"}}, "dropout='abc'"),
        ({"options": {"learn_sigma": 1}}, "learn_sigma=1: True or False"),
        ({"options": {"steps": "many"}}, "steps='many': a whole number"),
        ({"preset_name": "64x64"}, "nearest: 64x64_diffusion"),
        ({"preset_name": "64x64_diffusion", "config": SMALL_UNET}, "not both"),
        ({"description": Description(SMALL_UNET), "options": {"kind": "upsampler"}}, "those of a unet"),
    ],
    ids=str,
)
def test_wrong_answers_are_refused_by_name(arguments, said):
    options = arguments.get("options", {})
    if "num_heads" in options:
        options["use_new_attention_order"] = True
    with pytest.raises(InvalidArgument, match=re.escape(said) if "[" not in said else said):
        identify(network_shapes(SMALL_UNET), file="x", **arguments)


@pytest.mark.parametrize("folder", ["", "models/", "C:\\models\\"])
def test_a_released_files_name_tells_equal_shapes_apart(folder):
    shapes = network_shapes(preset("lsun_horse").config)
    for name in ("lsun_horse", "lsun_horse_nodropout", "256x256_diffusion_uncond"):
        assert identify(shapes, file=f"{folder}{name}.pt").preset is preset(name)
        assert identify(shapes, file=f"{folder}{name}.pt").config.dropout == preset(name).config.dropout
    tuned = identify(shapes, file=f"{folder}my_lsun_horse_tuned.pt")
    assert tuned.preset is None and len(tuned.candidates) == 5 and tuned.assumed
    assert identify(shapes, file="x.pt", options={"dropout": 0.3}).assumed == ()


def test_a_fine_tuned_model_is_told_what_it_is_nearest_to():
    tuned = dataclasses.replace(preset("512x512_diffusion").config, num_classes=None)
    shapes = network_shapes(tuned)
    near, differences = nearest_preset(shapes)
    assert near is preset("512x512_diffusion")
    assert differences.missing == {"label_emb.weight": (1000, 1024)}
    assert not differences.unexpected and not differences.misshapen
    with pytest.raises(AmbiguousCheckpoint) as caught:
        identify(shapes, file="x.pt")
    assert (
        "(the nearest released model is 512x512_diffusion, with image_size=512, "
        "use_new_attention_order=False, num_head_channels=64; "
        "the file differs from it: 1 key missing (label_emb.weight [1000, 1024]))"
    ) in str(caught.value)
    answers = {"image_size": 512, "use_new_attention_order": False, "num_head_channels": 64}
    assert identify(shapes, file="x.pt", options={**answers, "num_heads": 4}).config == tuned
    assert nearest_preset(network_shapes(SMALL_UNET)) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: {f"module.{k}": v for k, v in s.items()}, "every key begins with 'module.'"),
        (lambda s: {"conv_in.weight": (1,), "time_embedding.linear_1.weight": (1,)}, "diffusers"),
        (lambda s: {"fc.weight": (10, 10)}, r"no time_embed.0.weight \[4M, M\] among its keys \(fc.weight"),
        (lambda s: {**s, "time_embed.0.weight": (100, 32)}, "no time_embed.0.weight"),
        (
            lambda s: {k: v for k, v in s.items() if not k.startswith("input_blocks.0")},
            "the stem, is missing",
        ),
        (lambda s: {k: v for k, v in s.items() if k != "out.2.weight"}, "out.2.weight"),
        (lambda s: {k: v for k, v in s.items() if "input_blocks.1." not in k}, "input_blocks.1.0"),
        (lambda s: {k: v for k, v in s.items() if "input_blocks.3." not in k}, "no regular levels"),
        (lambda s: {k: v for k, v in s.items() if "output_blocks.3." not in k}, "no regular levels"),
        (lambda s: {**s, "input_blocks.2.1.norm.weight": (32,)}, "no regular levels"),
    ],
    ids=[
        "module",
        "diffusers",
        "other",
        "embedding",
        "stem",
        "head",
        "first",
        "down",
        "up",
        "attention",
    ],
)
def test_what_is_no_adm_network_is_said_to_be_none(change, said):
    with pytest.raises(CheckpointError, match=said) as caught:
        identify(change(network_shapes(SMALL_UNET)), file="x.pt")
    assert str(caught.value).startswith("x.pt: ") and "\n" not in str(caught.value)
    assert not isinstance(caught.value, AmbiguousCheckpoint)


def test_differences_are_counted_and_listed():
    has, needs = (
        network_shapes(SMALL_UNET),
        network_shapes(dataclasses.replace(SMALL_UNET, num_classes=7, num_res_blocks=2)),
    )
    differences = compare(has, needs)
    assert set(differences.missing) == set(needs) - set(has) != set()
    assert differences.misshapen["label_emb.weight"] == ((10, 128), (7, 128))
    assert not compare(has, has) and compare(has, has).summary() == "no differences"


def test_a_summary_counts_the_keys_and_lists_the_first_ones():
    has = {"a.weight": (1, 2), "b.weight": (3,), "old.0": (), "old.1": (6,)}
    needs = {"a.weight": (1, 3), "b.weight": (3,), "new.0": (4,), "new.1": (5,)}
    text = "2 keys missing (new.0 [4]{}); 2 keys unexpected (old.0 []{}); 1 key with another shape (a.weight "
    text += "[1, 2], not [1, 3])"
    assert compare(has, needs).summary(1) == text.format(", ...", ", ...")
    assert compare(has, needs).summary(2) == text.format(", new.1 [5]", ", old.1 [6]")


def test_a_fingerprint_follows_keys_and_shapes_only():
    shapes = network_shapes(SMALL_UNET)
    assert fingerprint(dict(reversed(shapes.items()))) == fingerprint(shapes)
    key = next(iter(shapes))
    assert fingerprint({**shapes, key: (1, 2)}) != fingerprint(shapes)
    assert fingerprint({k: v for k, v in shapes.items() if k != key}) != fingerprint(shapes)


@pytest.mark.parametrize("config", SMALL_NETS, ids=lambda config: config.kind)
def test_no_damage_to_the_shapes_gets_past_the_error(config):
    """Every network with keys removed or shapes changed at random is refused with an AdmfastError."""
    rng = random.Random(0)
    whole = network_shapes(config)
    refused = 0
    for _ in range(300):
        shapes = dict(whole)
        for key in rng.sample(sorted(shapes), rng.randint(1, 4)):
            if rng.random() < 0.5:
                del shapes[key]
            else:
                shapes[key] = rng.choice([(), (1,), (0, 3), (7, 32), (32, 1, 1, 1, 1, 1)])
        try:
            identify(
                shapes, file="x", options={**hidden_options(config), "num_res_blocks": config.num_res_blocks}
            )
        except AdmfastError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused == 300


def random_config(seed: int) -> NetConfig:
    """Return a random configuration of any kind: every option is drawn; widths are 32 or 64."""
    rng = random.Random(seed)
    kind = rng.choice(["unet", "upsampler", "classifier"])
    levels = rng.randint(1, 4)
    base = rng.choice([32, 64, 96])
    widths = [32 * rng.randint(1, 2) for _ in range(levels)]
    channels = rng.choice([1, 2, 3, 4])
    shared = {
        "image_size": 32,
        "in_channels": channels,
        "model_channels": base,
        "num_res_blocks": rng.randint(1, 3),
        "attention_resolutions": tuple(2**i for i in range(levels) if rng.random() < 0.4),
        "channel_mult": tuple(_multiplier(width, base) for width in widths),
        "conv_resample": rng.random() < 0.7,
        "dropout": rng.choice([0.0, 0.1]),
        "num_heads": rng.choice([1, 2, 4]),
        "num_head_channels": rng.choice([-1, 16, 32]),
        "use_scale_shift_norm": rng.random() < 0.5,
        "resblock_updown": rng.random() < 0.5,
        "use_new_attention_order": rng.random() < 0.5,
    }
    if kind == "classifier":
        pool = rng.choice(["adaptive", "attention", "spatial", "spatial_v2"])
        dims = rng.choice([1, 2, 3]) if pool.startswith("spatial") else 2
        if pool == "attention" and shared["num_head_channels"] == -1:
            shared["num_head_channels"] = 32
        return ClassifierConfig(**shared, dims=dims, pool=pool, out_channels=rng.choice([2, 10, 1000]))
    cls = UNetConfig if kind == "unet" else UpsamplerConfig
    return cls(
        **shared,
        dims=rng.choice([1, 2, 2, 3]),
        num_classes=rng.choice([None, 10]),
        out_channels=channels * rng.choice([1, 2]),
    )


def _multiplier(width: int, base: int) -> float:
    """Return width / base, slightly more if int(multiplier * base) falls short, as an int if whole."""
    multiplier = width / base
    if int(multiplier * base) != width:
        multiplier += 1e-9
    return int(multiplier) if multiplier.is_integer() else multiplier
