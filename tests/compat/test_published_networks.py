"""Tests of the published networks' constructors, attributes and calls, provided by admfast's networks."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import admfast
from admfast.compat.guided_diffusion import nn as published_nn
from admfast.compat.guided_diffusion import script_util, unet
from admfast.models import UNet, UNetConfig
from tests.parity.golden import NETWORK_OUTPUT_LIMIT, compare
from tests.tools.random_checkpoint import random_state

UNET = (16, 3, 32, 6, 1, (2,))
OPTIONS = dict(channel_mult=(1, 2), num_head_channels=16, use_scale_shift_norm=True)
T = torch.tensor([10, 700])


def filled(net):
    net.load_state_dict(random_state(net.config))
    return net.eval()


@pytest.fixture
def net():
    return filled(unet.UNetModel(*UNET, **OPTIONS))


def test_attributes_are_those_of_the_published_constructor():
    net = unet.UNetModel(*UNET, **OPTIONS, num_classes=4, num_heads=2, use_fp16=True)
    expected = dict(
        image_size=16, in_channels=3, model_channels=32, out_channels=6, num_res_blocks=1,
        attention_resolutions=(2,), dropout=0, channel_mult=(1, 2), conv_resample=True, num_classes=4,
        use_checkpoint=False, dtype=torch.float16, num_heads=2, num_head_channels=16, num_heads_upsample=2,
    )  # fmt: skip
    assert {name: getattr(net, name) for name in expected} == expected
    # The stem, two blocks and one downsampling, the middle, and two up blocks for each level.
    assert net._feature_size == 32 + (32 + 64) + 32 + 64 + 2 * (32 + 64)
    assert unet.SuperResModel(*UNET, **OPTIONS).in_channels == 6
    classifier = unet.EncoderUNetModel(*UNET, **OPTIONS, pool="spatial")
    assert classifier.out[0].in_features == classifier._feature_size and classifier.pool == "spatial"


def test_initial_weights_take_the_published_draws():
    torch.manual_seed(5)
    net = unet.UNetModel(*UNET, **OPTIONS)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    config = dict(image_size=16, model_channels=32, out_channels=6, num_res_blocks=1)
    ours = UNet(UNetConfig(**config, attention_resolutions=(2,), **OPTIONS))
    assert torch.equal(torch.get_rng_state(), after)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), ours.parameters(), strict=True))


def test_one_timestep_serves_all_images(net):
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        compare(net(x, T[:1]), net(x, T[:1].expand(2)), NETWORK_OUTPUT_LIMIT, "output")


def test_labels_are_given_where_there_are_classes(net):
    x = torch.randn(2, 3, 16, 16)
    with pytest.raises(AssertionError, match="y must"):
        net(x, T, y=T)
    with pytest.raises(AssertionError, match="y must"):
        filled(unet.UNetModel(*UNET, **OPTIONS, num_classes=4))(x, T)
    with pytest.raises(TypeError, match="ref_img"):
        net(x, T, ref_img=x)


def test_calls_fold_and_see_what_is_written(net):
    x = torch.randn(2, 3, 16, 16)
    # In training mode a network is never folded. Without dropout its output is the same.
    plain = copy.deepcopy(net).train()
    for change in (lambda: None, lambda: net.out[2].weight.data.mul_(2), lambda: net.double()):
        change()
        plain.load_state_dict(net.state_dict())
        plain.to(net.out[2].weight.dtype)
        given = x.to(net.out[2].weight.dtype)
        with torch.no_grad():
            found, expected = net(given, T), plain(given, T)
        assert net.is_folded and not plain.is_folded
        assert found.is_contiguous() and found.dtype == given.dtype
        compare(found, expected, NETWORK_OUTPUT_LIMIT, "output")


def test_half_precision_is_of_the_torso(net):
    net.convert_to_fp16()
    kinds = {name.partition(".")[0]: p.dtype for name, p in net.named_parameters() if p.dim() == 4}
    half = {"input_blocks", "middle_block", "output_blocks"}
    assert all(dtype == (torch.float16 if part in half else torch.float32) for part, dtype in kinds.items())
    with torch.no_grad():
        assert net(torch.randn(2, 3, 16, 16), T).dtype == torch.float32
    net.convert_to_fp32()
    assert {p.dtype for p in net.parameters()} == {torch.float32}


def test_copies_pickles_and_replicas_work(net):
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = net(x, T)
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        for twin in (copy.deepcopy(net), torch.load(file, weights_only=False), nn.DataParallel(net)):
            assert torch.equal(twin(x, T), expected)


def test_accelerate_takes_them_too(net):
    assert admfast.accelerate(net, precision="bf16") is net
    assert "whole" in admfast.accelerate.report(net)
    with torch.no_grad():
        net(torch.randn(2, 3, 16, 16), T)
    assert net.torso_dtype == torch.bfloat16 and net.out[2].weight.dtype == torch.float32


def test_autocast_decides_the_output_as_for_torch_layers(net):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert net(torch.randn(2, 3, 16, 16), T).dtype == torch.bfloat16


def test_flags_make_the_published_networks_and_processes():
    flags = script_util.model_and_diffusion_defaults()
    flags |= dict(image_size=64, num_channels=32, num_res_blocks=1, class_cond=True, learn_sigma=True)
    net, diffusion = script_util.create_model_and_diffusion(**flags, **{})
    assert net.num_classes == script_util.NUM_CLASSES and net.out_channels == 6
    assert net.attention_resolutions == (4, 8) and net.channel_mult == (1, 2, 3, 4)
    assert diffusion.num_timesteps == 1000 and diffusion.timestep_map[-1] == 999
    with pytest.raises(ValueError, match="channel_mult"):
        script_util.create_model(image_size=48, num_channels=32, num_res_blocks=1)
    with pytest.raises(ValueError, match="large_size"):
        script_util.sr_create_model(large_size=128, **dict.fromkeys(SR_FLAGS, 1))
    with pytest.raises(TypeError):
        script_util.create_model_and_diffusion(**flags, unknown=1)


SR_FLAGS = [
    "small_size", "num_channels", "num_res_blocks", "learn_sigma", "class_cond", "use_checkpoint",
    "attention_resolutions", "num_heads", "num_head_channels", "num_heads_upsample", "use_scale_shift_norm",
    "dropout", "resblock_updown", "use_fp16",
]  # fmt: skip


def test_checkpoint_and_averages_compute_what_they_say():
    layer, x = nn.Linear(3, 3), torch.randn(2, 3, requires_grad=True)
    for flag in (False, True):
        out = published_nn.checkpoint(layer, (x,), layer.parameters(), flag)
        grads = torch.autograd.grad(out.sum(), [x, layer.weight])
        assert torch.equal(grads[0], layer.weight.sum(0).expand(2, 3))
        assert torch.allclose(grads[1], x.detach().sum(0).expand(3, 3))
    target = [torch.tensor([1.0])]
    published_nn.update_ema(target, [torch.tensor([3.0])], rate=0.75)
    assert target[0].item() == 1.5
