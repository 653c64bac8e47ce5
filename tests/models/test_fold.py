"""Folded networks: the same function, the same parameters; when the derived forms are used, and renewed."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from admfast.errors import InvalidArgument
from admfast.models.fold import FoldOptions
from tests.ops.tolerance import assert_within
from tests.small import classifier, randn, unet, upsampler

N = 2
Y = torch.tensor([1, 3])
T = torch.tensor([20, 700])
NETS = {
    "unet": unet,
    "unet new order": lambda seed=0: unet(seed, use_new_attention_order=True),
    "unet additive, resampled by convolutions": lambda seed=0: unet(
        seed, use_scale_shift_norm=False, resblock_updown=False, conv_resample=True
    ),
    "unet resampled by blocks": lambda seed=0: unet(seed, resblock_updown=True),
    "unet 1d": lambda seed=0: unet(seed, dims=1),
    "unet 3d": lambda seed=0: unet(seed, dims=3),
    "upsampler": upsampler,
    "classifier attention": classifier,
    "classifier adaptive": lambda seed=0: classifier(seed, pool="adaptive"),
    "classifier spatial": lambda seed=0: classifier(seed, pool="spatial"),
    "classifier spatial_v2": lambda seed=0: classifier(seed, pool="spatial_v2"),
}
OFF = {
    "channels_last": False,
    "two_sources": False,
    "residual": False,
    "qkv_rows": False,
    "subpixel": True,
    "embeddings": False,
    "conv": "library",
}


def made(name: str):
    return NETS[name]().requires_grad_(False)


def call(net, dtype=torch.float32, grad=False) -> list[Tensor]:
    """The output for fixed inputs, and the gradient in x of its product with fixed noise."""
    config = net.config
    x = randn(N, config.in_channels, *[config.image_size] * config.dims).to(dtype).requires_grad_(True)
    given = {}
    if getattr(config, "num_classes", None) is not None:
        given["y"] = Y
    if config.kind == "upsampler":
        given["low_res"] = randn(N, config.in_channels, *[4] * config.dims, seed=1).to(dtype)
    out = net(x, T, **given)
    (g,) = torch.autograd.grad((out * randn(*out.shape, seed=2).to(dtype)).sum(), x)
    return [out.detach(), g]


@pytest.mark.parametrize("name", NETS)
def test_a_folded_network_is_the_same_function(name):
    net = made(name)
    plain = call(net)
    truth = call(made(name).double(), torch.float64)
    assert net.fold() > 0 and net.is_folded
    for got, before, exact, what in zip(call(net), plain, truth, ("output", "input gradient"), strict=True):
        assert_within(got, before, exact, name, what)
    net.unfold()
    assert not net.is_folded and net.fold_bytes == 0
    assert all(torch.equal(a, b) for a, b in zip(call(net), plain, strict=True))


@pytest.mark.parametrize("option", OFF)
@pytest.mark.parametrize("name", ["unet resampled by blocks", "unet additive, resampled by convolutions"])
def test_each_option_can_be_switched_alone(name, option):
    net = made(name)
    plain, truth = call(net), call(made(name).double(), torch.float64)
    net.fold(dataclasses.replace(FoldOptions(), **{option: OFF[option]}))
    for got, before, exact, what in zip(call(net), plain, truth, ("output", "input gradient"), strict=True):
        assert_within(got, before, exact, option, what)


def test_an_option_of_the_wrong_kind_is_named():
    with pytest.raises(InvalidArgument, match="conv=3: the name of an implementation, or None"):
        FoldOptions(conv=3)


# What is derived, and from what


class Seen(TorchDispatchMode):
    """Names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__.partition(".")[0])
        return function(*args, **(kwargs or {}))


def operations(net) -> list[str]:
    x = randn(N, 1, 8, 8)
    with torch.no_grad(), Seen() as seen:
        net(x, T, Y)
    return seen.names


def test_no_concatenation_is_written_and_one_product_projects_the_embedding():
    net = made("unet resampled by blocks")
    layers = [module.emb_layers[1] for module in net.modules() if hasattr(module, "emb_layers")]
    single = []
    for layer in layers:
        layer.register_forward_hook(lambda *_: single.append(1))
    before = operations(net)
    assert before.count("cat") == 1 + len(net.output_blocks) and len(single) == len(layers)
    net.fold(FoldOptions(conv="library"))
    single.clear()
    assert operations(net).count("cat") == 1 and not single  # cos and sin
    assert net.projected_width == sum(layer.out_features for layer in layers)


def test_rows_of_legacy_qkv_are_permuted_bit_for_bit():
    net = made("unet")
    block = net.middle_block[1]
    x = randn(N, 64, 4, 4).contiguous(memory_format=torch.channels_last)
    net.fold(FoldOptions(conv="library", qkv_rows=False))
    own = block(x)
    assert not block.qkv.reordered
    net.fold(FoldOptions(conv="library"))
    assert block.qkv.reordered
    assert torch.equal(block.qkv.folded.parts[0].weight, block.qkv.weight[block.qkv.rows])
    assert torch.equal(block(x), own)


def test_the_state_dict_is_the_published_one_and_nothing_derived_is_saved():
    net = made("unet")
    before = {key: value.clone() for key, value in net.state_dict().items()}
    net.fold(dtype=torch.bfloat16)
    after = net.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert not other.is_folded and all(p.dtype == torch.float32 for p in other.parameters())
        assert all(torch.equal(a, b) for a, b in zip(call(other), call(made("unet")), strict=True))


def test_half_precision_leaves_parameters_embeddings_and_the_last_layer():
    net = made("unet")
    plain = call(net)[0]
    net.fold(dtype=torch.bfloat16)
    assert net.torso_dtype == torch.bfloat16
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert net.out[2].folded.parts[0].dtype == torch.float32
    assert net.input_blocks[0][0].folded.parts[0].dtype == torch.bfloat16
    rounded = made("unet").convert_torso(torch.bfloat16)
    half, published = call(net)[0], call(rounded)[0]
    # The published recipe rounds the same weights; what is left is the order of sums in bfloat16.
    assert (half - published).norm() < 0.02 * plain.norm() and 0 < (half - plain).norm() < 0.05 * plain.norm()


# When it is used


def test_trainable_parameters_are_refused_and_never_folded_away():
    net = unet()
    with pytest.raises(InvalidArgument, match="parameters='trainable': freeze them first"):
        net.fold()
    net.requires_grad_(False).fold()
    net.middle_block[0].out_layers[3].weight.requires_grad_(True)
    net(randn(N, 1, 8, 8), T, Y).sum().backward()
    assert net.middle_block[0].out_layers[3].weight.grad is not None


def test_training_mode_and_functional_call_take_the_parameters():
    net = made("unet")
    other = {key: value * 1.5 for key, value in net.named_parameters()}
    x = randn(N, 1, 8, 8)
    wanted = torch.func.functional_call(net, other, (x, T, Y))
    plain = net(x, T, Y)
    net.fold(dtype=torch.bfloat16)
    assert torch.equal(torch.func.functional_call(net, other, (x, T, Y)), wanted)
    assert torch.equal(net.train()(x, T, Y), plain)
    assert not torch.equal(net.eval()(x, T, Y), plain)


@pytest.mark.parametrize("change", ["in place", "load_state_dict", "assign", "data"])
def test_changed_parameters_are_taken_up_in_the_same_memory(change):
    net, wanted = made("unet"), made("unet")
    options = FoldOptions(conv="library")
    net.ensure_folded(options, torch.float32)
    forms = [part for m in net.modules() if getattr(m, "_folded", None) for part in m._folded.parts]
    before, generation = [form.weight.data_ptr() for form in forms], net.fold_generation
    state = {key: 1.25 * value for key, value in net.state_dict().items()}
    wanted.load_state_dict(state)
    if change == "in place":
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(1.25)
    elif change == "data":
        for parameter in net.parameters():
            parameter.data.mul_(1.25)
        net.ensure_folded(options, torch.float32)  # can't see it
        assert (call(net)[0] - call(wanted)[0]).abs().max() > 1e-3
        net.refold()
    else:
        net.load_state_dict(state, assign=change == "assign")
        net.requires_grad_(False)
    net.ensure_folded(options, torch.float32)
    assert [form.weight.data_ptr() for form in forms] == before and net.fold_generation == generation
    wanted.fold(options)
    assert all(torch.equal(a, b) for a, b in zip(call(net), call(wanted), strict=True))


def test_moving_and_converting_drop_what_was_derived():
    net = made("unet")
    net.fold(dtype=torch.bfloat16)
    assert not net.double().is_folded
    assert call(net, torch.float64)[0].dtype == torch.float64
    net = made("unet")
    net.fold()
    assert not net.convert_torso(torch.float16).is_folded and net.torso_dtype == torch.float16
