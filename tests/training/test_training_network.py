"""Tests of the network of a run: fresh, from a file with other classes, frozen."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from admfast.checkpoints import write_weights
from admfast.diffusion import DiffusionConfig
from admfast.errors import CheckpointError, InvalidArgument, Unavailable
from admfast.models.description import Description
from admfast.training.learner import Learner
from admfast.training.network import build_network, freeze, resolve_precision, set_precision
from tests.small import classifier, unet
from tests.training.small_runs import batch, same, small_recipe


def with_classes(kind: str, count: int, **changes):
    recipe = small_recipe(kind)
    field = "out_channels" if kind == "classifier" else "num_classes"
    network = dataclasses.replace(recipe.network, **{field: count})
    return dataclasses.replace(recipe, network=network, **changes)


@pytest.fixture
def file(tmp_path):
    net = unet()
    path = tmp_path / "unet.safetensors"
    write_weights(path, net.state_dict(), Description(net.config, DiffusionConfig(learn_sigma=True)))
    return path


def test_weights_follow_the_seed_and_leave_torch_s_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = build_network(small_recipe(seed=2**64 - 1)).state_dict()
    assert torch.equal(torch.rand(2), expected)
    same(first, build_network(small_recipe(seed=2**64 - 1)).state_dict())
    other = build_network(small_recipe(seed=1)).state_dict()
    assert not torch.equal(first["time_embed.0.weight"], other["time_embed.0.weight"])


def test_a_file_gives_all_its_weights(file):
    net = build_network(small_recipe(), file)
    same(net.state_dict(), unet().state_dict())
    assert net.training and net.config.dropout == 0.3


@pytest.mark.parametrize("drop, kept", [(0.0, 0), (0.1, 4)])
def test_classes_begin_anew_but_for_a_null_class(file, drop, kept):
    recipe = with_classes("diffusion", 5, drop_classes=drop)
    found, given, fresh = (
        net.state_dict() for net in (build_network(recipe, file), unet(), build_network(recipe))
    )
    assert torch.equal(found["label_emb.weight"][:kept], given["label_emb.weight"][:kept])
    assert torch.equal(found["label_emb.weight"][kept:], fresh["label_emb.weight"][kept:])
    del found["label_emb.weight"], given["label_emb.weight"]
    same(found, given)


def test_a_classifier_with_other_classes_keeps_its_body(tmp_path):
    path, net = tmp_path / "c.pt", classifier()
    write_weights(path, net.state_dict(), Description(net.config))
    found, given = build_network(with_classes("classifier", 7), path).state_dict(), net.state_dict()
    differing = [key for key in found if found[key].shape != given[key].shape]
    assert differing == ["out.2.c_proj.weight", "out.2.c_proj.bias"]
    for key in set(found) - set(differing):
        assert torch.equal(found[key], given[key]), key


def test_files_of_other_networks_are_refused(file):
    with pytest.raises(InvalidArgument, match="from=.*num_heads"):
        network = dataclasses.replace(small_recipe().network, num_heads=1)
        build_network(dataclasses.replace(small_recipe(), network=network), file)
    file.with_suffix(".json").unlink()
    plain = file.with_suffix(".pt")
    write_weights(plain, unet(channel_mult=(1, 1)).state_dict())
    with pytest.raises(CheckpointError, match="does not fit"):
        build_network(small_recipe(), plain)
    state = unet().state_dict()
    del state["out.2.bias"]
    write_weights(plain, state)
    with pytest.raises(CheckpointError, match=r"out\.2\.bias"):
        build_network(small_recipe(), plain)


def test_frozen_parameters_stay():
    recipe = small_recipe(freeze=("input_blocks.*", "time_embed.*"), weight_decay=0.5, lr=0.1)
    learner = Learner(recipe, build_network(recipe))
    before = {key: value.clone() for key, value in learner.net.state_dict().items()}
    for step in range(2):
        learner.update(batch(recipe, range(4 * step, 4 * step + 4), learner.sampler))
    for key, value in learner.net.state_dict().items():
        frozen = key.startswith(("input_blocks.", "time_embed."))
        assert torch.equal(value, before[key]) == frozen or not frozen and not before[key].any(), key
    for patterns in (("nothing.*",), ("*",)):
        with pytest.raises(InvalidArgument, match="freeze"):
            freeze(build_network(small_recipe()), patterns)


def test_precisions_of_devices(default_precision):
    recipe = small_recipe(precision="auto")
    assert resolve_precision(recipe, torch.device("cpu")).precision == "fp32"
    assert resolve_precision(recipe, torch.device("cuda")).precision == "bf16"
    with pytest.raises(Unavailable, match="tf32"):
        resolve_precision(small_recipe(precision="tf32"), torch.device("cpu"))
    with pytest.raises(Unavailable, match="bf16"):
        set_precision(torch.nn.Linear(2, 2), "bf16")
