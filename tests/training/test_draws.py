"""Tests that the draws for sample k depend only on the run's seed and k."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from admfast.errors import InvalidArgument
from admfast.models.dropout import Dropout, keyed_dropout
from admfast.ops.update import as_seeds, normal
from admfast.training.draws import TrainStream, draw_normals, draw_uniforms
from admfast.training.samples import DataStream
from admfast.training.timesteps import UniformSampler
from tests.training.small_runs import batch, small_recipe

KS = [0, 1, 5, 2**32 - 1]


def test_streams_of_all_purposes_differ():
    below = [int(stream) for stream in (*TrainStream, *DataStream) if stream != TrainStream.DROPOUT]
    assert len(set(below)) == len(below) and max(below) < TrainStream.DROPOUT and min(below) >= 5


def test_numbers_belong_to_samples_not_to_batches():
    whole, z = draw_uniforms(3, KS, TrainStream.TIMESTEP), draw_normals(3, KS, (2, 3), TrainStream.NOISE)
    assert ((whole >= 0) & (whole < 1)).all() and len(set(whole.tolist())) == len(KS)
    for i, k in enumerate(KS):
        assert draw_uniforms(3, [k], TrainStream.TIMESTEP) == whole[i]
        assert torch.equal(draw_normals(3, [k], (2, 3), TrainStream.NOISE)[0], z[i])
        assert torch.equal(z[i], normal(as_seeds([3]), (2, 3), k, TrainStream.NOISE)[0])
    assert (draw_uniforms(4, KS, TrainStream.TIMESTEP) != whole).all()
    assert (draw_uniforms(3, KS, TrainStream.CLASS) != whole).all()


def test_timesteps_are_even():
    t, weights = UniformSampler(10).choose(draw_uniforms(0, range(20000), TrainStream.TIMESTEP))
    counts = torch.bincount(t, minlength=10)
    # The limit is five standard deviations of a binomial count.
    assert ((counts - 2000).abs() < 5 * (20000 * 0.1 * 0.9) ** 0.5).all() and (weights == 1).all()


@pytest.mark.parametrize("kind", ["diffusion", "classifier", "upsampler"])
def test_a_batch_is_its_samples(kind):
    more = {"noise_augmentation": 0.5} if kind == "upsampler" else {}
    recipe = small_recipe(kind, **more)
    sampler = UniformSampler(1000)
    whole = batch(recipe, range(3, 9), sampler)
    for k in range(3, 9):
        one = batch(recipe, [k], sampler)
        for name in ("images", "t", "noise", "weights", "labels", "low_res"):
            a, b = getattr(one, name), getattr(whole, name)
            assert (a is None and b is None) or torch.equal(a[0], b[k - 3]), name
    parts = whole.split(4)
    assert [len(part) for part in parts] == [4, 2] and parts[1].sample_ids == (7, 8)
    assert torch.equal(torch.cat([part.noise for part in parts]), whole.noise)


def test_classes_are_dropped_to_the_last_one():
    recipe = small_recipe(drop_classes=0.5)
    assert recipe.num_image_classes == 3
    labels = batch(recipe, range(400), UniformSampler(1000)).labels
    plain = batch(small_recipe(), range(400), UniformSampler(1000)).labels
    # The draws say which images lose their class; all others keep it.
    dropped = draw_uniforms(recipe.seed, range(400), TrainStream.CLASS) < 0.5
    assert torch.equal(labels, torch.where(dropped, 3, plain))
    # The limit is five standard deviations of the share of dropped images.
    assert abs(dropped.float().mean() - 0.5) < 5 * 0.5 / 400**0.5


# Dropout


def test_masks_belong_to_samples_and_layers():
    net = nn.Sequential(Dropout(0.25), Dropout(0.25)).train()
    x = torch.ones(3, 40, 25)
    with keyed_dropout(net, 7, [4, 5, 6], TrainStream.DROPOUT):
        first, second = net[0](x), net[1](x)
        torch.manual_seed(1)
        assert torch.equal(net[0](x), first)
    with keyed_dropout(net, 7, [5], TrainStream.DROPOUT):
        assert torch.equal(net[0](x[:1])[0], first[1])
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])
    assert set(first.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs((first == 0).float().mean() - 0.25) < 5 * (0.25 * 0.75 / 3000) ** 0.5
    z = normal(as_seeds([7]), (40, 25), 4, TrainStream.DROPOUT + 1)[0]
    assert torch.equal(second[0] == 0, z < torch.special.ndtri(torch.tensor(0.25, dtype=torch.float64)))


def test_without_a_key_dropout_is_torch_s():
    x = torch.ones(2, 50)
    ours, theirs = Dropout(0.5), nn.Dropout(0.5)
    torch.manual_seed(0)
    expected = theirs(x)
    torch.manual_seed(0)
    assert torch.equal(ours(x), expected)
    with keyed_dropout(ours, 0, [0, 1], TrainStream.DROPOUT):
        assert torch.equal(ours.eval()(x), x)
    ours.train()
    with pytest.raises(InvalidArgument, match="sample_ids"), keyed_dropout(ours, 0, [0], TrainStream.DROPOUT):
        ours(x)
    assert ours.key is None
