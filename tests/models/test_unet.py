"""Tests of the UNet and the upsampler: every option, precisions, gradients and errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from admfast.errors import InvalidArgument
from admfast.models import UNetConfig, build, unet_config_from_flags
from admfast.models.presets import MODELS
from tests.parity.golden import NETWORK_GRADIENT_LIMIT, NETWORK_OUTPUT_LIMIT, compare, golden_root
from tests.small import CLASSES, randn, unet, upsampler, with_weights

T = torch.tensor([3, 800])
Y = torch.tensor([0, 3])

# Changes to `tests.small.UNET`, one option each.
OPTIONS: dict[str, dict] = {
    "base": {},
    "new attention order": {"use_new_attention_order": True},
    "additive embedding": {"use_scale_shift_norm": False},
    "resblock_updown": {"resblock_updown": True},
    "no conv_resample": {"conv_resample": False},
    "head channels": {"num_heads": 1, "num_head_channels": 16},
    "heads_upsample": {"num_heads_upsample": 4},
    "unconditional": {"num_classes": None},
    "one class": {"num_classes": 1},
    "fixed variance": {"out_channels": 1},
    "one level": {"channel_mult": (1,), "attention_resolutions": (1,)},
    "half width first": {"model_channels": 64, "channel_mult": (0.5, 1)},
    "no attention but the middle": {"attention_resolutions": ()},
    "attention everywhere": {"attention_resolutions": (1, 2)},
    "three blocks": {"num_res_blocks": 3},
    "checkpointed": {"use_checkpoint": True},
    "dropout": {"dropout": 0.4},
    "one-dimensional": {"dims": 1},
    "volumes": {"dims": 3},
    "volumes, resblock_updown": {"dims": 3, "resblock_updown": True},
    "volumes, no conv_resample": {"dims": 3, "conv_resample": False},
    "three channels": {"in_channels": 3, "out_channels": 6},
    "five channels": {"in_channels": 5, "out_channels": 5},
}
every_option = pytest.mark.parametrize("changes", OPTIONS.values(), ids=OPTIONS)


def inputs(
    net: torch.nn.Module, side: int = 8, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Return two images with timesteps and, for a network with classes, labels."""
    config = net.config
    call = {"x": randn(2, config.in_channels, *[side] * config.dims, dtype=dtype), "timesteps": T}
    return call if config.num_classes is None else {**call, "y": Y % config.num_classes}


@every_option
def test_every_option_gives_an_image_and_float64_agrees(changes):
    net = unet(**changes)
    call = inputs(net)
    out = net(**call)
    assert out.shape == (2, net.config.out_channels, *call["x"].shape[2:])
    assert out.dtype == torch.float32 and 0.1 < out.std() < 10
    double = net.double()(**{**call, "x": call["x"].double()})
    assert double.dtype == torch.float64
    compare(out, double, NETWORK_OUTPUT_LIMIT, "float32 against float64")


@pytest.mark.parametrize(
    "changes",
    [
        {"use_new_attention_order": True},
        {"num_heads": 4},
        {"num_heads_upsample": 4},
        {"num_heads": 1, "num_head_channels": 16},
    ],
    ids=lambda changes: ", ".join(changes),
)
def test_options_that_share_their_weights_still_act(changes):
    base, other = unet(), unet(**changes)
    call = inputs(base)
    assert base.state_dict().keys() == other.state_dict().keys()
    assert (base(**call) - other(**call)).abs().max() > 1e-3


def test_heads_of_the_up_path_are_those_of_heads_upsample():
    net = unet(num_heads=2, num_heads_upsample=4, attention_resolutions=(1, 2))
    heads = {name: module.num_heads for name, module in net.named_modules() if hasattr(module, "num_heads")}
    assert {n.split(".")[0]: h for n, h in heads.items()} == {
        "input_blocks": 2,
        "middle_block": 2,
        "output_blocks": 4,
    }
    net = unet(num_heads_upsample=4, num_head_channels=32)
    assert {m.num_heads for m in net.modules() if hasattr(m, "num_heads")} == {2}


def test_other_sizes_than_the_configured_run():
    net = unet()
    assert net(randn(2, 1, 16, 4), T, Y).shape == (2, 2, 16, 4)
    assert net(randn(0, 1, 8, 8), T[:0], Y[:0]).shape == (0, 2, 8, 8)


def test_images_do_not_see_each_other():
    net = unet()
    call = inputs(net)
    one = net(call["x"][:1], T[:1], Y[:1])
    compare(one, net(**call)[:1], NETWORK_OUTPUT_LIMIT, "alone against in a batch")


def test_time_and_class_act():
    net = unet()
    call = inputs(net)
    out = net(**call)
    assert (net(**{**call, "timesteps": T + 100}) - out).abs().max() > 0.1
    assert (net(**{**call, "y": Y.flip(0)}) - out).abs().max() > 0.1
    compare(net(**{**call, "timesteps": T.float()}), out, NETWORK_OUTPUT_LIMIT, "float timesteps")


def test_multipliers_of_a_half_come_from_the_flags():
    config = unet_config_from_flags(
        image_size=8,
        in_channels=1,
        num_channels=64,
        num_res_blocks=1,
        channel_mult="0.5,1",
        attention_resolutions="4",
        class_cond=True,
        num_classes=CLASSES,
    )
    net = with_weights(config)
    assert net.input_blocks[0][0].out_channels == 32
    assert net(**inputs(net)).shape == (2, 1, 8, 8)


def test_dropout_acts_in_training_alone():
    net = unet(dropout=0.5)
    call = inputs(net)
    compare(net(**call), net(**call), NETWORK_OUTPUT_LIMIT, "evaluated twice")
    net.train()
    torch.manual_seed(0)
    first, second = net(**call), net(**call)
    assert (first - second).abs().max() > 0.1
    torch.manual_seed(0)
    compare(net(**call), first, NETWORK_OUTPUT_LIMIT, "the same draws")


def test_build_gives_a_zero_output_in_evaluation_mode():
    net = build(unet().config)
    assert not net.training and not net(**inputs(net)).any()


# Gradients


def same(gradient: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare up to rounding: the order of sums in matrix products may change from call to call."""
    compare(gradient, expected, NETWORK_GRADIENT_LIMIT, "gradient")


def gradients(net: torch.nn.Module, call: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the gradients of sum(out^2) in x and in every trainable parameter."""
    x = call["x"].clone().requires_grad_(True)
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    loss = net(**{**call, "x": x}).square().sum()
    found = torch.autograd.grad(loss, [x, *trained.values()])
    return found[0], dict(zip(trained, found[1:], strict=True))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_checkpointing_changes_no_gradient(dims):
    plain, recomputing = unet(dims=dims), unet(dims=dims, use_checkpoint=True)
    call = inputs(plain)
    dx, parameters = gradients(plain, call)
    dx_again, parameters_again = gradients(recomputing, call)
    same(dx_again, dx)
    assert len(parameters) == len(list(plain.parameters()))
    largest = max(float(gradient.abs().max()) for gradient in parameters.values())
    for name, gradient in parameters.items():
        # Some gradients are zero up to rounding (a bias before a norm): the limit is relative to the largest.
        assert (parameters_again[name] - gradient).abs().max() <= NETWORK_GRADIENT_LIMIT * largest, name
    frozen, _ = gradients(recomputing.requires_grad_(False), call)
    same(frozen, dx)


def test_checkpointing_repeats_the_dropout_of_the_forward_pass():
    found = []
    for use_checkpoint in (False, True):
        net = unet(dropout=0.5, use_checkpoint=use_checkpoint).train()
        torch.manual_seed(1)
        found.append(gradients(net, inputs(net))[0])
    same(*found)
    assert found[0].abs().max() > 0.1


@pytest.mark.parametrize("use_checkpoint", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_backward_twice_over_one_graph(use_checkpoint, frozen):
    net = unet(use_checkpoint=use_checkpoint).requires_grad_(not frozen)
    call = inputs(net)
    x = call["x"].requires_grad_(True)
    loss = net(**call).square().sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    same(second, first)
    assert first.abs().max() > 0.1


def double_backward(net: torch.nn.Module) -> None:
    """Check d(|dL/dx|^2)/dx in float64 against its finite difference along one direction."""
    net = net.double().requires_grad_(False)
    call = inputs(net, side=4, dtype=torch.float64)

    def squared(x: torch.Tensor, graph: bool = True) -> torch.Tensor:
        loss = net(**{**call, "x": x}).square().sum()
        return torch.autograd.grad(loss, x, create_graph=graph)[0].square().sum()

    x = call["x"].requires_grad_(True)
    (second,) = torch.autograd.grad(squared(x), x)
    step = 1e-5 * randn(*x.shape, seed=5, dtype=torch.float64)
    ends = [squared((x + sign * step).detach().requires_grad_(True), False) for sign in (1, -1)]
    # Relative errors of central differences: step^2 = 1e-10, and rounding / step = 1e-11.
    torch.testing.assert_close(2 * (second * step).sum(), ends[0] - ends[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("use_checkpoint", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("implementation", ["", "reference"], ids=["fused", "reference"])
def test_double_backward(use_checkpoint, implementation, monkeypatch):
    monkeypatch.setenv("ADMFAST_IMPL", implementation)
    double_backward(unet(use_checkpoint=use_checkpoint))


def test_the_hessian_times_a_vector_is_that_of_the_reference(monkeypatch):
    net = unet(attention_resolutions=(1, 2)).requires_grad_(False)
    call = inputs(net)

    def product() -> torch.Tensor:
        x = call["x"].clone().requires_grad_(True)
        (first,) = torch.autograd.grad(net(**{**call, "x": x}).square().sum(), x, create_graph=True)
        return torch.autograd.grad((first * randn(*x.shape, seed=7)).sum(), x)[0]

    fused = product()
    assert fused.abs().max() > 0.1
    monkeypatch.setenv("ADMFAST_IMPL", "reference")
    same(fused, product())


@pytest.mark.parametrize("use_checkpoint", [False, True], ids=["stored", "recomputed"])
def test_functional_gradients(use_checkpoint):
    net = unet(use_checkpoint=use_checkpoint).requires_grad_(False)
    call = inputs(net)
    x, rest = call["x"], {name: value for name, value in call.items() if name != "x"}
    wanted, _ = gradients(net, call)
    found = torch.func.grad(lambda x: net(x, **rest).square().sum())(x)
    same(found, wanted)
    out, pull = torch.func.vjp(lambda x: net(x, **rest), x)
    compare(out, net(**call), NETWORK_OUTPUT_LIMIT, "output")
    same(pull(2 * out)[0], wanted)


class Masks(TorchDispatchMode):
    """A mode that records which gradients each convolution's backward computes: (input, weight, bias)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[bool]] = []
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.seen.append(list(args[-1]))
        self.products += func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("use_checkpoint", [False, True], ids=["stored", "recomputed"])
def test_frozen_parameters_cost_no_weight_gradient(use_checkpoint):
    net = unet(use_checkpoint=use_checkpoint)
    products = {}
    for frozen in (False, True):
        net.requires_grad_(not frozen)
        call = inputs(net)
        x = call["x"].requires_grad_(True)
        loss = net(**call).square().sum()
        with Masks() as masks:
            loss.backward()
        # Either all convolutions compute gradients of weights, or none.
        assert len(masks.seen) > 10 and {mask[1] for mask in masks.seen} == {not frozen}
        assert x.grad is not None and all((p.grad is None) == frozen for p in net.parameters())
        products[frozen] = masks.products
        net.zero_grad()
    assert products[True] < products[False]


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("updown", [False, True], ids=["convolutions", "resblock_updown"])
def test_convert_torso_runs_in_half_precision(dtype, updown):
    net = unet(resblock_updown=updown)
    call = inputs(net)
    exact = net(**call)
    seen = {}
    for name in ("input_blocks", "middle_block", "output_blocks", "out"):
        last = net.get_submodule(name)[-1]
        last.register_forward_hook(lambda _m, _i, out, name=name: seen.__setitem__(name, out.dtype))
    assert net.convert_torso(dtype) is net and net.torso_dtype == dtype
    out = net(**call)
    assert seen == {
        "input_blocks": dtype,
        "middle_block": dtype,
        "output_blocks": dtype,
        "out": torch.float32,
    }
    assert out.dtype == torch.float32
    # A few dozen layers each round once: errors add up like a random walk, to about sqrt(50) roundings.
    error = (out - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt()
    assert 0 < error < 10 * torch.finfo(dtype).eps
    (gradient,) = torch.autograd.grad(net(**{**call, "x": call["x"].requires_grad_(True)}).sum(), call["x"])
    assert gradient.dtype == torch.float32 and gradient.isfinite().all()


@pytest.mark.parametrize("torso", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_output_has_the_dtype_of_x(torso):
    net = unet().convert_torso(torso)
    call = inputs(net)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        out = net(**{**call, "x": call["x"].to(dtype)})
        assert out.dtype == dtype and out.isfinite().all()


def test_a_network_wholly_in_half_precision_runs():
    net = unet().to(torch.bfloat16)
    assert net.torso_dtype == torch.bfloat16
    assert net(**inputs(net)).dtype == torch.float32


def released() -> list:
    root = golden_root()
    path = None if root is None else root / "full_size_keys" / "index.json"
    if path is None or not path.exists():
        return [pytest.param(None, None, marks=pytest.mark.skip(reason="golden data is missing"), id="none")]
    entries = json.loads(Path(path).read_text())
    return [pytest.param(name, entry, id=name) for name, entry in entries.items()]


@pytest.mark.parametrize("name, entry", released())
def test_convert_torso_casts_the_published_tensors_of_every_released_model(name, entry):
    with torch.device("meta"):
        net = build(MODELS[name].config)
    wanted = entry["float16_after_convert_to_fp16"]
    before = {key: value.dtype for key, value in net.state_dict().items()}
    halves = [k for k, v in net.convert_torso(torch.float16).state_dict().items() if v.dtype == torch.float16]
    # Kinds leave out the numbers: "input_blocks.4.0.in_layers.2.weight" is "input_blocks.in_layers.weight".
    kinds = {".".join(part for part in key.split(".") if not part.isdigit()) for key in halves}
    assert sorted(kinds) == wanted["kinds"]
    assert len(halves) == wanted["num_tensors"]
    assert {key.split(".")[0] for key in halves} <= {"input_blocks", "middle_block", "output_blocks"}
    after = {key: value.dtype for key, value in net.convert_torso(torch.float32).state_dict().items()}
    assert after == before


# Errors


@pytest.mark.parametrize(
    "call, message",
    [
        ({"y": None}, "y=None: this network needs class labels"),
        ({"y": [0, 1]}, "y='list': a tensor of class indices, int64"),
        ({"y": Y.float()}, "y='torch.float32': a tensor of class indices, int64"),
        ({"y": Y + 100}, r"y=\[\d+, \d+\]: 0 to \d+"),
        ({"y": Y[:1]}, r"y.shape=\(1,\): one class for each image, \(2,\)"),
        ({"x": randn(2, 3, 8, 8)}, r"x.shape=\(2, 3, 8, 8\): \[N, 1, ...\] with 2 spatial dimensions"),
        ({"x": randn(2, 1, 8)}, r"x.shape=\(2, 1, 8\): \[N, 1, ...\] with 2 spatial dimensions"),
        ({"x": randn(2, 1, 8, 7)}, r"x.shape=\(2, 1, 8, 7\): sides that 2 divides"),
        ({"timesteps": T[:1]}, r"timesteps.shape=\(1,\): one for each image, \(2,\)"),
        ({"timesteps": torch.tensor(3)}, r"timesteps.shape=\(\)"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    net = unet()
    with pytest.raises(InvalidArgument, match=message):
        net(**{**inputs(net), **call})


def test_labels_that_are_not_wanted_are_refused():
    with pytest.raises(InvalidArgument, match="y='given': this network takes no class labels"):
        unet(num_classes=None)(randn(2, 1, 8, 8), T, Y)


def test_the_first_side_of_a_volume_may_be_odd():
    net = unet(dims=3)
    assert net(randn(2, 1, 3, 4, 4), T, Y).shape == (2, 2, 3, 4, 4)


# The upsampler


@pytest.mark.parametrize("dims, mode", [(1, "linear"), (2, "bilinear"), (3, "trilinear")])
def test_upsampler_is_the_network_on_x_and_the_enlarged_image(dims, mode):
    net = upsampler(dims=dims)
    low_res, x = randn(2, 1, *[4] * dims), randn(2, 1, *[8] * dims, seed=1)
    large = torch.nn.functional.interpolate(low_res, scale_factor=2, mode=mode)
    plain = with_weights(UNetConfig(**{**vars(net.config), "in_channels": 2}))
    plain.load_state_dict(net.state_dict())
    expected = plain(torch.cat([x, large], dim=1), T, Y)
    compare(net(x, T, Y, low_res=low_res), expected, NETWORK_OUTPUT_LIMIT, mode)


def test_upsampler_has_gradients_in_both_images_and_runs_in_half_precision():
    net = upsampler().requires_grad_(False)
    low_res, x = randn(2, 1, 4, 4).requires_grad_(True), randn(2, 1, 16, 16, seed=1).requires_grad_(True)
    found = torch.autograd.grad(net(x, T, Y, low_res=low_res).square().sum(), [x, low_res])
    assert all(gradient.abs().max() > 0.1 for gradient in found)
    net.convert_torso(torch.bfloat16)
    assert net(x, T, Y, low_res=low_res).dtype == torch.float32


@pytest.mark.parametrize(
    "low_res, message",
    [
        (None, r"low_res=None: an upsampler needs the low-resolution image"),
        (randn(1, 1, 4, 4), r"low_res.shape=\(1, 1, 4, 4\): \[2, 1, ...\]"),
        (randn(2, 3, 4, 4), r"low_res.shape=\(2, 3, 4, 4\): \[2, 1, ...\]"),
        (randn(2, 1, 4), r"low_res.shape=\(2, 1, 4\): \[2, 1, ...\]"),
    ],
)
def test_wrong_low_resolution_images_are_named(low_res, message):
    with pytest.raises(InvalidArgument, match=message):
        upsampler()(randn(2, 1, 16, 16), T, Y, low_res=low_res)
