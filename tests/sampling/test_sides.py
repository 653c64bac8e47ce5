"""Tests of images with another size or shape than a network was trained for, and of upsampling them."""

from __future__ import annotations

import pytest
import torch

from admfast.errors import InvalidArgument
from admfast.models.presets import MODELS
from admfast.ops.update import as_seeds, normal
from admfast.sampling.load import load
from admfast.sampling.pipeline import Pipeline
from admfast.sampling.plan import plan
from admfast.sampling.request import SampleRequest
from tests.small import PROCESS, cascade, classifier, pipeline, randn, unet, upsampler

SEEDS = [3, 2**64 - 1]


@pytest.mark.parametrize("size", [(4, 12), (16, 8), 6])
def test_a_size_is_the_noise_of_that_shape(size):
    pipe = pipeline(classifier=None, guidance=0.0)
    sides = (size, size) if isinstance(size, int) else size
    noise = normal(as_seeds(SEEDS), (1, *sides), 0, 0)
    settings = {"seeds": SEEDS, "steps": 3, "output": "float"}
    found = pipe.sample(size=size, **settings)
    assert found.shape == (2, 1, *sides) and torch.equal(found, pipe.sample(noise=noise, **settings))
    alone = normal(as_seeds(SEEDS[1:]), (1, *sides), 0, 0)
    assert torch.equal(alone, noise[1:]), "the noise must not depend on the batch"


def test_every_network_takes_a_size():
    volume = Pipeline("volume", unet(dims=3, attention_resolutions=()), PROCESS, steps=1)
    assert volume.sample(size=(3, 4, 6)).shape == (1, 3, 4, 6, 1)
    with pytest.raises(InvalidArgument, match=r"^size=\(3, 4, 5\): .*1x2x2 divides; nearest: 3x4x4"):
        volume.sample(size=(3, 4, 5))
    signal = Pipeline("signal", unet(dims=1), PROCESS, steps=1)
    assert signal.sample(size=10).shape == signal.sample(size=[10]).shape == (1, 10, 1)


def test_a_cascade_enlarges_each_side():
    pipe = cascade(classifier=None, guidance=0.0)
    small = {"seeds": 1, "steps": 1, "upsampler_steps": 1}
    assert pipe.sample(size=(8, 12), **small).shape == (1, 16, 24, 1)
    unknown = cascade(low_res_size=None, classifier=None, guidance=0.0)
    assert unknown.sample(size=(8, 16), **small).shape == (1, 16, 32, 1)
    assert plan(SampleRequest(size=(8, 12)), pipe).sides == {"base": (8, 12), "upsampler": (16, 24)}


@pytest.mark.parametrize("pool", ["adaptive", "spatial", "spatial_v2"])
def test_a_classifier_without_an_attention_pool_guides_any_size(pool):
    pipe = pipeline(classifier=classifier(1, pool=pool))
    assert pipe.sample(seeds=1, steps=1, size=(4, 12)).shape == (1, 4, 12, 1)
    deep = pipeline(classifier=classifier(1, pool=pool, channel_mult=(1, 1, 1, 1)))
    with pytest.raises(InvalidArgument, match=r"^size=\(4, 16\): sides of 8"):
        deep.sample(size=(4, 16))


@pytest.mark.parametrize("given", [{"size": 16}, {"noise": randn(1, 1, 16, 16)}, {"size": (4, 16)}])
def test_an_attention_pool_takes_its_own_size_only(given):
    name = next(iter(given))
    with pytest.raises(InvalidArgument, match=f"^{name}.*8x8"):
        pipeline().check(**given)
    assert pipeline().check(guidance=0, **given)


@pytest.mark.parametrize("sides, made", [((8, 16), (16, 32)), ((5, 7), (10, 14)), ((16, 16), (32, 32))])
def test_an_upsampler_keeps_the_shape(sides, made):
    up = Pipeline("up", upsampler(), PROCESS, steps=1, low_res_size=8)
    given = {"seeds": 1, "low_res": randn(1, 1, *sides), "output": "float"}
    found = up.sample(**given)
    noise = normal(as_seeds([1]), (1, *made), 0, 0)
    assert found.shape == (1, 1, *made) and torch.equal(found, up.sample(**given, noise=noise))


def test_an_upsampler_of_unknown_factor_squashes_nothing():
    up = Pipeline("up", upsampler(), PROCESS, steps=1)
    assert up.sample(low_res=randn(1, 1, 4, 4)).shape == (1, 16, 16, 1)
    with pytest.raises(InvalidArgument, match=r"^low_res.shape=\(1, 1, 4, 8\): .*low_res_size.*size"):
        up.check(low_res=randn(1, 1, 4, 8))
    assert up.sample(low_res=randn(1, 1, 4, 8), size=(8, 16)).shape == (1, 8, 16, 1)


def test_sides_that_an_upsampler_can_not_take_are_named():
    up = Pipeline("up", upsampler(), PROCESS, steps=1, low_res_size=12)
    # 16/12 of each side must be a multiple of 2.
    with pytest.raises(InvalidArgument, match=r"^low_res.shape=\(1, 1, 7, 8\): .*3 divides; nearest: 6x9"):
        up.check(low_res=randn(1, 1, 7, 8))
    assert up.sample(low_res=randn(1, 1, 6, 9)).shape == (1, 8, 12, 1)


def test_a_file_says_what_it_enlarges_and_an_option_goes_before():
    path = MODELS["digits32_upsampler"].shipped_path
    wide = SampleRequest(low_res=randn(1, 1, 8, 16))
    assert load(path).low_res_size == 8 and plan(wide, load(path)).shape == (1, 1, 32, 64)
    up = load(path, low_res_size=torch.tensor(4))
    assert up.low_res_size == 4 and plan(wide, up).shape == (1, 1, 64, 128)
    with pytest.raises(InvalidArgument, match="^low_res_size=0: "):
        load(path, low_res_size=0)
    with pytest.raises(InvalidArgument, match="^low_res_size=8: .*unet"):
        load(MODELS["digits32_diffusion"].shipped_path, low_res_size=8)
