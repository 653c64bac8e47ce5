"""Tests of recipes: presets, changes, JSON and errors."""

from __future__ import annotations

import dataclasses
import json

import pytest

from admfast.errors import InvalidArgument
from admfast.models.presets import MODELS, preset
from admfast.training.recipe import KINDS, recipe_from_json
from admfast.training.recipes import PRESETS, change_recipe, recipe_from_preset
from tests.training.small_runs import small_recipe

EVERY = [(kind, name) for kind in KINDS for name in PRESETS[kind]]


@pytest.mark.parametrize("kind, name", EVERY, ids=lambda value: value)
def test_every_preset_travels_as_json(kind, name):
    found = recipe_from_preset(kind, name)
    assert recipe_from_json(found.to_json()) == found
    assert isinstance(found.network, KINDS[kind]) and (found.low_res_size is None) == (kind != "upsampler")
    assert any(found.network == model.config for model in MODELS.values())


@pytest.mark.parametrize("kind", KINDS)
def test_the_digits_keep_the_settings_that_their_weights_were_trained_with(kind):
    facts, found = preset(f"digits32_{kind}").description.training, recipe_from_preset(kind)
    trained = recipe_from_json(json.dumps(facts["recipe"]))
    assert dataclasses.replace(found, precision=trained.precision) == trained and trained.precision == "fp32"
    assert (facts["step"], facts["surroundings"]["data"]) == (found.steps, "digits")


def test_changes_reach_recipe_network_and_process():
    found = recipe_from_preset("diffusion", steps=7, diffusion_steps=50, dropout=0.5, num_classes=3, ema=0.5)
    assert (found.steps, found.process.steps, found.network.dropout, found.ema) == (7, 50, 0.5, (0.5,))
    assert found.num_image_classes == found.network.num_classes == 3
    assert recipe_from_preset("classifier", num_classes=3).num_image_classes == 3
    with_null = recipe_from_preset("diffusion", num_classes=3, drop_classes=0.1)
    assert (with_null.num_image_classes, with_null.network.num_classes) == (3, 4)
    assert change_recipe(with_null, {"lr": 1.0}).network.num_classes == 4
    assert change_recipe(with_null, {"num_classes": 7}).num_image_classes == 7
    grey = recipe_from_preset("diffusion", "imagenet64", in_channels=1)
    assert (grey.network.in_channels, grey.network.out_channels) == (1, 2)
    with pytest.raises(InvalidArgument, match="batch_size"):
        recipe_from_preset("diffusion", batchsize=3)


def test_learning_rate_rises_holds_and_falls():
    found = small_recipe(steps=100, lr=2.0, warmup=10, cooldown=0.3)
    rates = [found.learning_rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[4] == pytest.approx(1.0)
    assert rates[9:71] == [2.0] * 62
    assert rates[85] == pytest.approx(1.0) and rates[99] == pytest.approx(2 / 30)
    assert {small_recipe(steps=10, lr=2.0).learning_rate(step) for step in range(10)} == {2.0}


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"steps": 0}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"microbatch": 5}, "microbatch"),
        ({"lr": 0.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"warmup": -1}, "warmup"),
        ({"cooldown": 1.5}, "cooldown"),
        ({"clip": 0.0}, "clip"),
        ({"ema": (1.0,)}, "ema"),
        ({"ema": ()}, "ema"),
        ({"ema_power": (0.5,)}, "ema_power"),
        ({"precision": "fp8"}, "precision"),
        ({"sampler": "even"}, "sampler"),
        ({"drop_classes": 2.0}, "drop_classes"),
        ({"noised": False}, "noised"),
        ({"low_res_size": 4}, "low_res_size"),
        ({"noise_augmentation": 0.1}, "noise_augmentation"),
        ({"checkpointing": "some"}, "checkpointing"),
        ({"checkpointing": 0}, "checkpointing"),
        ({"random_flip": "no"}, "random_flip"),
        ({"seed": -1}, "seed"),
        ({"steps": 2**31, "batch_size": 4}, "steps"),
        ({"kind": "classifier"}, "network"),
    ],
)
def test_settings_that_are_not_allowed(changes, named):
    with pytest.raises(InvalidArgument, match=f"^{named}="):
        dataclasses.replace(small_recipe(), **changes)


def test_settings_that_only_another_kind_has():
    for changes in ({"drop_classes": 0.1}, {"sampler": "loss-second-moment"}, {"published_sum": True}):
        with pytest.raises(InvalidArgument, match=f"^{next(iter(changes))}="):
            small_recipe("classifier", **changes)
    for size in (None, 3):
        with pytest.raises(InvalidArgument, match="low_res_size"):
            small_recipe("upsampler", low_res_size=size)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kind": "diffusion"}', '{"colour": 1}'])
def test_json_that_is_no_recipe(text):
    with pytest.raises(InvalidArgument, match="recipe"):
        recipe_from_json(text)
