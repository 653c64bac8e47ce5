"""Tests of folded networks: same function, same parameters; when derived forms are used and renewed."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from admfast import host
from admfast.errors import InvalidArgument, Unavailable
from admfast.models.fold import PARTS, FoldOptions
from admfast.models.fold.net import WINOGRAD_BYTES
from admfast.models.hooks import keep_fused
from admfast.ops.conv import FoldedConv
from admfast.ops.conv.winograd import amplification
from admfast.ops.dispatch import record_choices
from admfast.verify.budget import BUDGETS
from tests.ops.tolerance import assert_within
from tests.small import classifier, randn, unet, upsampler

N = 6
Y = torch.tensor([1, 3, 0, 2, 2, 1])
T = torch.tensor([20, 700, 999, 0, 500, 333])
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
WHOLE = FoldOptions(conv="library")
OTHERS = {part: dataclasses.replace(WHOLE, _without=frozenset({part})) for part in sorted(PARTS)}
OTHERS["conv"] = FoldOptions(conv="reference")


def made(name: str):
    return NETS[name]().requires_grad_(False)


def call(net, dtype=torch.float32, grad=False) -> list[Tensor]:
    """Return the output for fixed inputs, and the gradient in x of its product with fixed noise."""
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


def assert_same(net, plain: list[Tensor], truth: list[Tensor], conv: str | None) -> None:
    """Compare output and gradient with the unfolded network. Winograd rounds more: its terms are larger."""
    growth = (1.0, 1.0) if conv == "library" else amplification()
    for got, before, exact, what in zip(call(net), plain, truth, ("output", "input gradient"), strict=True):
        assert_within(got, before, exact, what, what, growth=growth)


@pytest.mark.parametrize("conv", ["library", None], ids=["library", "chosen"])
@pytest.mark.parametrize("name", NETS)
def test_a_folded_network_is_the_same_function(name, conv):
    net = made(name)
    plain = call(net)
    truth = call(made(name).double(), torch.float64)
    net.fold(FoldOptions(conv=conv))
    assert net.is_folded
    assert_same(net, plain, truth, conv)
    net.unfold()
    assert not net.is_folded
    assert all(conv._folded is None for _, conv in net._convolutions()) and net._projections is None
    assert all(torch.equal(a, b) for a, b in zip(call(net), plain, strict=True))


@pytest.mark.parametrize("option", OTHERS)
@pytest.mark.parametrize("name", ["unet resampled by blocks", "unet additive, resampled by convolutions"])
def test_each_part_can_be_left_out(name, option):
    net = made(name)
    plain, truth = call(net), call(made(name).double(), torch.float64)
    net.fold(OTHERS[option])
    assert_same(net, plain, truth, "library")


def test_an_option_of_the_wrong_kind_is_named():
    with pytest.raises(InvalidArgument, match="^conv=3"):
        FoldOptions(conv=3)
    with pytest.raises(InvalidArgument, match="^int8='yes'"):
        FoldOptions(int8="yes")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["unet resampled by blocks", "unet additive, resampled by convolutions"])
def test_in_8_bits_are_the_3x3_convolutions_between_first_and_last(name, dtype):
    net = made(name)
    plain = call(net)
    net.fold(FoldOptions(int8=True), dtype)
    with record_choices() as choices:
        outcome = call(net)
    of_8_bits = {name for name, conv in net._convolutions() if conv.folded.options.int8}
    in_blocks = {name for name, _ in net.named_modules() if name.endswith(("in_layers.2", "out_layers.3"))}
    upsampling = {name for name, _ in net.named_modules() if re.search(r"output_blocks\..*\.conv$", name)}
    assert of_8_bits == in_blocks | upsampling and len(in_blocks) > 10
    ran = [choice for choice in choices if choice.op == "conv_int8"]
    assert len(ran) == 3 * len(of_8_bits)  # a recorded call chooses twice, its gradient once
    for got, exact in zip(outcome, plain, strict=True):
        error = float((got.double() - exact.double()).norm() / exact.double().norm())
        assert BUDGETS["fp32"].step < error < BUDGETS["int8"].step


def test_the_first_layer_is_never_in_8_bits_whatever_its_channels():
    net = unet(in_channels=16)
    net.fold(FoldOptions(int8=True), torch.bfloat16)
    first = net.get_submodule("input_blocks.0.0")
    assert first.weight.shape[1] == 16 and not first.folded.options.int8


@pytest.mark.parametrize("dims", [1, 3])
def test_8_bits_without_a_convolution_in_two_dimensions_are_refused(dims):
    net = unet(dims=dims)
    with pytest.raises(Unavailable, match="^precision='int8': the network has no 3x3 convolution"):
        net.fold(FoldOptions(int8=True))
    assert not net.is_folded


@dataclasses.dataclass
class Runs:
    """Counts of how often a forward uses the path of each option."""

    channels_last: int = 0  # convolutions of channels-last images
    two_sources: int = 0  # concatenations that are avoided
    residual: int = 0  # convolutions that add the skip themselves
    qkv_rows: int = 0  # qkv products with rows in the new order
    embeddings: int = 0  # blocks that don't project the embedding themselves
    conv: int = 0  # convolutions by the implementation "reference"


def what_runs(net, monkeypatch) -> Runs:
    found, blocks = Runs(), [m for m in net.modules() if hasattr(m, "emb_layers")]
    real = FoldedConv.__call__

    def convolve(self, x, residual=None, x2=None):
        found.residual += residual is not None
        found.channels_last += x.dim() == 4 and x.movedim(1, -1).is_contiguous()
        return real(self, x, residual, x2)

    layers = [
        m.emb_layers[1].register_forward_hook(lambda *_: setattr(found, "embeddings", found.embeddings - 1))
        for m in blocks
    ]
    found.embeddings = len(blocks)
    with monkeypatch.context() as patched, record_choices() as choices, keep_fused():
        patched.setattr(FoldedConv, "__call__", convolve)
        found.two_sources = 1 + len(net.output_blocks) - operations(net).count("cat")
    for hook in layers:
        hook.remove()
    found.qkv_rows = sum(m.qkv.reordered for m in net.modules() if hasattr(m, "qkv"))
    found.conv = sum(choice.op == "conv" and choice.name == "reference" for choice in choices)
    return found


@pytest.mark.parametrize("option", OTHERS)
def test_each_option_changes_what_runs_and_nothing_else(option, monkeypatch):
    # Three channels: with one channel both layouts would be the same.
    net = unet(resblock_updown=True, in_channels=3, out_channels=6).requires_grad_(False)
    net.fold(FoldOptions(conv="library"))
    before = what_runs(net, monkeypatch)
    net.fold(OTHERS[option])
    after = what_runs(net, monkeypatch)
    changed = {name for name, count in vars(after).items() if count != getattr(before, name)}
    assert changed == {option}
    on, off = (after, before) if option == "conv" else (before, after)
    assert getattr(on, option) > getattr(off, option)
    # The output of attention is always channels-last.
    assert getattr(off, option) == 0 or option == "channels_last"


# Derived forms


class Seen(TorchDispatchMode):
    """A mode that records the names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__.partition(".")[0])
        return function(*args, **(kwargs or {}))


def operations(net) -> list[str]:
    x = randn(N, net.config.in_channels, 8, 8)
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
    with keep_fused():
        assert operations(net).count("cat") == 1 and not single  # only cos and sin are concatenated
    assert net.projected_width == sum(layer.out_features for layer in layers)


def test_rows_of_legacy_qkv_are_permuted_bit_for_bit():
    net = made("unet")
    block = net.middle_block[1]
    x = randn(N, 64, 4, 4).contiguous(memory_format=torch.channels_last)
    net.fold(OTHERS["qkv_rows"])
    own = block(x)
    assert not block.qkv.reordered
    net.fold(FoldOptions(conv="library"))
    assert block.qkv.reordered and torch.equal(block(x), own)
    (form,) = block.qkv.folded.forms()
    assert torch.equal(form, block.qkv.weight[block.qkv.rows])


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
    assert net.out[2].folded.dtype == torch.float32
    assert net.input_blocks[0][0].folded.dtype == torch.bfloat16
    rounded = made("unet").convert_torso(torch.bfloat16)
    half, published = call(net)[0], call(rounded)[0]
    # The published recipe rounds the same weights, so only the order of bfloat16 sums differs.
    assert (half - published).norm() < 0.02 * plain.norm() and 0 < (half - plain).norm() < 0.05 * plain.norm()


# When derived forms are used


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


def test_autocast_takes_the_parameters():
    plain, folded = (made("unet resampled by blocks") for _ in range(2))
    folded.fold(FoldOptions())
    size = plain.config.image_size
    x, labels = randn(N, plain.config.in_channels, size, size), {"y": Y} if plain.config.num_classes else {}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, got = (net(x, T, **labels) for net in (plain, folded))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("change", ["functional_call", "requires_grad_"])
def test_projections_follow_their_layers(change):
    net = made("unet")
    x, layer = randn(N, 1, 8, 8), net.middle_block[0].emb_layers[1]
    other = {"middle_block.0.emb_layers.1.weight": 1.5 * layer.weight}
    plain = net(x, T, Y)
    wanted = torch.func.functional_call(net, other, (x, T, Y))
    net.fold(FoldOptions(conv="library"))
    assert net.joins_projections
    if change == "functional_call":
        got = torch.func.functional_call(net, other, (x, T, Y))
        assert (got - wanted).abs().max() < 1e-4 < (wanted - plain).abs().max()
    else:
        layer.weight.requires_grad_(True)
        net(x, T, Y).sum().backward()
        assert layer.weight.grad is not None and not net.joins_projections


def memory_of(net) -> list[int]:
    """Return the addresses of all derived forms."""
    found = [module.folded for module in net.modules() if hasattr(type(module), "folded")]
    forms = [form for folded in found for form in folded.forms()]
    return [form.data_ptr() for form in (*forms, net._projections.weight, net._projections.bias)]


def scale(net, way: str, factor: float = 1.25) -> None:
    """Scale all parameters in one of the ways that programs use to write to them."""
    parameters = list(net.parameters())
    state = {key: factor * value for key, value in net.state_dict().items()}
    if way == "load_state_dict":
        net.load_state_dict(state)
    elif way == "assign":
        net.load_state_dict(state, assign=True)
        net.requires_grad_(False)
    elif way == "data replaced":
        for p in parameters:
            p.data = factor * p.data  # new memory
    elif way == "set_":
        with torch.no_grad():
            for p in parameters:
                p.set_(factor * p)
    elif way == "a vector":
        torch.nn.utils.vector_to_parameters(
            factor * torch.nn.utils.parameters_to_vector(parameters), parameters
        )
    elif way == "numpy":
        for p in parameters:
            p.detach().numpy()[...] *= factor
    elif way == "foreach on data":
        torch._foreach_mul_([p.data for p in parameters], factor)
    elif way == "inference mode":
        with torch.inference_mode():
            for p in parameters:
                p.mul_(factor)
    else:
        for p in parameters:
            (p.data if way == "data" else p.detach()).mul_(factor)


MOVING = ("assign", "data replaced", "set_", "a vector")
WRITES = (*MOVING, "load_state_dict", "data", "detach", "numpy", "foreach on data", "inference mode")


@pytest.mark.parametrize("way", WRITES)
def test_changed_parameters_are_taken_up_in_the_same_memory(way):
    net, wanted = made("unet"), made("unet")
    options = FoldOptions(conv="library")
    net.ensure_folded(options, torch.float32)
    call(net)  # derived forms are made at their first use
    before, generation = memory_of(net), net.fold_generation
    assert len(before) > 20
    scale(wanted, "load_state_dict")
    scale(net, way)
    net.ensure_folded(options, torch.float32)
    assert memory_of(net) == before
    # Captured graphs also read parameters without derived forms: norms and the embedding's layers.
    assert (net.fold_generation != generation) == (way in MOVING)
    wanted.fold(options)
    assert all(torch.equal(a, b) for a, b in zip(call(net), call(wanted), strict=True))


@pytest.mark.parametrize("way", [*MOVING, "load_state_dict", "detach", "inference mode"])
def test_a_call_takes_up_the_writes_that_torch_counts(way):
    net, wanted = made("unet"), made("unet")
    for each in (net, wanted):
        each.ensure_folded(WHOLE, torch.float32)
    call(net)
    scale(wanted, "load_state_dict")
    scale(net, way)
    assert all(torch.equal(a, b) for a, b in zip(call(net), call(wanted), strict=True))


def test_a_buffer_that_moves_is_a_change():
    net = made("unet")
    net.middle_block.register_buffer("note", torch.zeros(2))
    net.ensure_folded(WHOLE, torch.float32)
    generation = net.fold_generation
    net.ensure_folded(WHOLE, torch.float32)
    assert net.fold_generation == generation
    net.middle_block.note = torch.zeros(2)
    net.ensure_folded(WHOLE, torch.float32)
    assert net.fold_generation > generation


def test_moving_and_converting_drop_what_was_derived():
    net = made("unet")
    net.fold(dtype=torch.bfloat16)
    assert not net.double().is_folded
    assert call(net, torch.float64)[0].dtype == torch.float64
    net = made("unet")
    net.fold()
    assert not net.convert_torso(torch.float16).is_folded and net.torso_dtype == torch.float16


@pytest.mark.parametrize("name, directions", [("unet", 1), ("classifier attention", 2)])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_the_smallest_convolutions_get_what_memory_there_is(name, directions, share, monkeypatch):
    """Winograd forms take at most a sixth of the memory that the process may use."""
    net = made(name)
    sizes = {
        name: WINOGRAD_BYTES * directions * m.weight.numel()
        for name, m in net.named_modules()
        if hasattr(m, "fold_weights")
    }
    allowed = int(share * sum(sizes.values()))
    monkeypatch.setattr(host, "memory_limit", lambda: 6 * allowed)
    net.fold()
    spared = {name for name in sizes if net.get_submodule(name).folded.options.spare_memory}
    kept = [sizes[name] for name in sizes.keys() - spared]
    assert sum(kept) <= allowed and (sum(kept) > 0.5 * allowed or share == 0)
    assert all(sizes[name] >= max(kept, default=0) for name in spared) and bool(spared) == (share < 1)
