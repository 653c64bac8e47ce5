"""Tests of hooks and replaced layers in a folded network: layers see the published inputs and outputs."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune

from admfast.models.fold import FoldOptions
from admfast.models.hooks import keep_fused
from tests.small import classifier, randn, unet, upsampler

# Both sides are float64 and do the same operations in another order: some thousand roundings.
FLOAT64 = {"rtol": 1e-9, "atol": 1e-9}
T, Y = torch.tensor([20, 700]), torch.tensor([1, 3])
NETS = {
    "unet": lambda: unet(resblock_updown=True),
    "new order": lambda: unet(use_new_attention_order=True),
    "additive": lambda: unet(use_scale_shift_norm=False, resblock_updown=True),
    "resampled by convolutions": lambda: unet(resblock_updown=False, conv_resample=True),
    "resampled by averages": lambda: unet(resblock_updown=False, conv_resample=False),
    "1d": lambda: unet(dims=1, resblock_updown=True),
    "3d": lambda: unet(dims=3, resblock_updown=True),
    "upsampler": lambda: upsampler(resblock_updown=True),
    **{pool: lambda pool=pool: classifier(pool=pool) for pool in ("attention", "adaptive", "spatial_v2")},
}
# Modules of the published network that are not called: resampling that does nothing, and sequences whose
# layers are called one by one.
SILENT = ("h_upd", "x_upd", "in_layers", "out_layers", "input_blocks", "output_blocks")


def folded(name: str = "unet") -> nn.Module:
    net = NETS[name]().double().requires_grad_(False)
    net.fold(FoldOptions(conv="library"))
    return net


def call(net: nn.Module, x: Tensor | None = None) -> Tensor:
    config = net.config
    sides = [config.image_size] * config.dims
    x = randn(2, config.in_channels, *sides, dtype=torch.float64) if x is None else x
    given = {"y": Y} if getattr(config, "num_classes", None) is not None else {}
    if config.kind == "upsampler":
        given["low_res"] = randn(2, config.in_channels, *[4] * config.dims, seed=1, dtype=torch.float64)
    return net(x, T, **given)


def by_itself(module: nn.Module, x: Tensor) -> Tensor | None:
    """Return a layer's output for `x`, computed by torch's functions, or None for a container."""
    kernel = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, 32, module.weight, module.bias, 1e-5)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        convolution = kernel[module.weight.dim() - 2]
        return convolution(x, module.weight, module.bias, module.stride, module.padding)
    if isinstance(module, nn.Linear):
        return F.linear(x, module.weight, module.bias)
    if isinstance(module, nn.SiLU):
        return F.silu(x)
    if isinstance(module, nn.Identity | nn.Dropout):
        return x
    if hasattr(module, "legacy_order"):
        n, width, s = x.shape
        shape = (n, module.num_heads, 3, -1, s) if module.legacy_order else (n, 3, module.num_heads, -1, s)
        q, k, v = x.view(shape).unbind(2 if module.legacy_order else 1)
        weights = torch.softmax(torch.einsum("nhct,nhcs->nhts", q, k) / q.shape[2] ** 0.5, dim=-1)
        return torch.einsum("nhts,nhcs->nhct", weights, v).reshape(n, width // 3, s)
    return None


class Watch:
    """Context manager that records the inputs and output of every module's last call, by name."""

    def __init__(self, net: nn.Module, names: set[str] | None = None):
        self.seen: dict[str, tuple[tuple, Tensor]] = {}
        self.handles = [
            module.register_forward_hook(
                lambda _m, given, out, name=name: self.seen.update({name: (given, out)})
            )
            for name, module in net.named_modules()
            if names is None or name in names
        ]

    def __enter__(self) -> dict[str, tuple[tuple, Tensor]]:
        return self.seen

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("name", NETS)
def test_every_layer_gets_and_gives_what_it_does_alone(name):
    net = folded(name)
    wanted = call(net)
    with Watch(net) as seen:
        torch.testing.assert_close(call(net), wanted, **FLOAT64)
    missed = {n for n, _ in net.named_modules()} - set(seen)
    assert {n.split(".")[-1] for n in missed if not n.endswith("_upd.op")} <= set(SILENT)
    modules = dict(net.named_modules())
    for layer, ((x, *rest), out) in seen.items():
        alone = by_itself(modules[layer], x)
        if alone is not None:
            torch.testing.assert_close(
                out, alone, **FLOAT64, msg=lambda text, layer=layer: f"{layer}: {text}"
            )
        if hasattr(modules[layer], "emb_layers"):  # a residual block: embedding, branch, skip
            (emb,) = rest
            assert emb.shape == (2, modules[layer].emb_layers[1].in_features)
            torch.testing.assert_close(seen[f"{layer}.emb_layers"][0][0], emb, **FLOAT64)
            branch, skip = (seen[f"{layer}.{part}"][1] for part in ("out_layers.3", "skip_connection"))
            torch.testing.assert_close(out - skip, branch, **FLOAT64)
            torch.testing.assert_close(seen[f"{layer}.in_layers.0"][0][0], x, **FLOAT64)
        if f"{layer}.qkv" in seen:
            torch.testing.assert_close((out - x).flatten(2), seen[f"{layer}.proj_out"][1], **FLOAT64)
            torch.testing.assert_close(seen[f"{layer}.attention"][0][0], seen[f"{layer}.qkv"][1], **FLOAT64)


@pytest.mark.parametrize("name", ["unet", "additive", "attention"])
def test_a_hook_on_one_layer_sees_what_it_sees_among_others(name):
    net = folded(name)
    with Watch(net) as together:
        wanted = call(net)
    for layer in together:
        with Watch(net, {layer}) as seen:
            torch.testing.assert_close(call(net), wanted, **FLOAT64)
        given, out = seen[layer]
        assert len(given) == len(together[layer][0])
        torch.testing.assert_close(out, together[layer][1], **FLOAT64)
        torch.testing.assert_close(given[0], together[layer][0][0], **FLOAT64)


def test_neighbours_of_a_hooked_layer_stay_fused():
    net = folded()
    block, other = net.output_blocks[0][0], net.output_blocks[1][0]
    calls: dict[str, list[dict]] = {"block": [], "other": []}
    for name, module in (("block", block), ("other", other)):
        module.out_layers[0].forward = _noting(module.out_layers[0], calls[name])
    with keep_fused():
        call(net)
    given = [call["x_bias"] is None and set(call) for call in (*calls["block"], *calls["other"])]
    assert given == [{"silu", "scale", "shift", "x_bias"}] * 2
    del other.out_layers[0].forward
    with Watch(net, {"output_blocks.0.0.out_layers.3"}) as seen:
        call(net)
    assert seen and calls["block"][1] == {}
    with Watch(net, {"output_blocks.1.0.in_layers.0"}) as seen:
        call(net)
    assert len(calls["block"]) == 3 and len(seen) == 1


def _noting(module: nn.Module, calls: list[dict]):
    real = module.forward
    return lambda x, **options: (calls.append(options), real(x, **options))[1]


def test_what_a_hook_returns_takes_the_place_of_what_it_saw():
    net = folded()
    block = net.middle_block[0]
    block.out_layers[3].register_forward_hook(lambda _m, _x, out: torch.zeros_like(out))
    net.middle_block[1].norm.register_forward_pre_hook(lambda _m, given: (2 * given[0] + 1,))
    with Watch(net, {"middle_block.0", "middle_block.1", "middle_block.1.norm"}) as seen:
        call(net)
    (x, _), out = seen["middle_block.0"]
    assert torch.equal(out, x)  # input and output have equal channels, so the skip is the identity
    torch.testing.assert_close(seen["middle_block.1.norm"][0][0], (2 * out + 1).flatten(2), **FLOAT64)


def test_gradients_reach_backward_hooks():
    net, seen = folded(), {}
    conv = net.middle_block[0].in_layers[2]
    conv.register_full_backward_hook(lambda _m, dx, dy: seen.update(dx=dx[0], dy=dy[0]))
    conv.register_full_backward_pre_hook(lambda _m, dy: seen.update(before=dy[0]))
    x = randn(2, 1, 8, 8, dtype=torch.float64).requires_grad_(True)
    call(net, x).sum().backward()
    gradient = torch.nn.grad.conv2d_input(seen["dx"].shape, conv.weight, seen["dy"], padding=1)
    torch.testing.assert_close(seen["dx"], gradient, **FLOAT64)
    assert torch.equal(seen["before"], seen["dy"])
    plain = folded()
    x2 = x.detach().clone().requires_grad_(True)
    call(plain, x2).sum().backward()
    torch.testing.assert_close(x.grad, x2.grad, **FLOAT64)


def test_a_hook_on_every_module_there_is_sees_the_layers():
    net, seen = folded(), []
    wanted = call(net)
    handle = register_module_forward_hook(lambda module, _x, _y: seen.append(module))
    try:
        torch.testing.assert_close(call(net), wanted, **FLOAT64)
    finally:
        handle.remove()
    block = net.middle_block[0]
    assert {id(m) for m in (*block.in_layers, *block.emb_layers, *block.out_layers)} <= {id(m) for m in seen}
    seen.clear()
    call(net)
    assert not seen


class Wrapped(nn.Module):
    """A wrapper around a layer, as adapters use; its forward takes only x."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.layer(x)


def doubled(layer: nn.Module) -> None:
    with torch.no_grad():
        layer.weight.mul_(2)
        layer.bias.mul_(2)


LAYERS = [
    "time_embed.2",
    "input_blocks.0.0",
    "input_blocks.2.0.in_layers.0",
    "middle_block.0.in_layers.2",
    "middle_block.0.emb_layers.1",
    "middle_block.0.out_layers.3",
    "middle_block.1.norm",
    "middle_block.1.qkv",
    "middle_block.1.proj_out",
    "output_blocks.0.0.skip_connection",
    "output_blocks.0.0.in_layers.2",
    "out.0",
    "out.2",
]


HOW = {
    "module": ("before folding", "after folding"),
    "forward": ("after folding",),
    "weight_norm": ("before folding", "after folding"),
    "prune": ("after folding",),
}
CASES = [
    (layer, how, when)
    for layer in LAYERS
    for how, times in HOW.items()
    for when in times
    # weight_norm and prune need weights with at least two dimensions.
    if how in ("module", "forward") or not layer.endswith((".norm", "out.0", "in_layers.0"))
]


@pytest.mark.parametrize("layer, how, when", CASES)
def test_another_layer_may_stand_in_the_place_of_each(layer, how, when):
    net, wanted = NETS["unet"]().double().requires_grad_(False), folded()
    if when == "after folding":
        net.fold(FoldOptions(conv="library"))
    parent, _, name = layer.rpartition(".")
    module = net.get_submodule(layer)
    if how == "module":
        setattr(net.get_submodule(parent), name, Wrapped(module))
    elif how == "forward":
        real = module.forward
        module.forward = lambda x: 2 * real(x)
    elif how == "weight_norm":
        parametrizations.weight_norm(module).requires_grad_(False)
        module.parametrizations.weight.original0.mul_(2)
        module.bias.mul_(2)
    else:
        mask = (randn(*module.weight.shape, seed=3) > 0).double()
        prune.custom_from_mask(module, "weight", mask)
    if how == "prune":
        with torch.no_grad():
            wanted.get_submodule(layer).weight.mul_(mask)
    else:
        doubled(wanted.get_submodule(layer))
    wanted.refold()
    if when == "before folding":
        net.fold(FoldOptions(conv="library"))
    torch.testing.assert_close(call(net), call(wanted), **FLOAT64)


@pytest.mark.parametrize("change", ["padding_mode", "dilation", "_conv_forward"])
@pytest.mark.parametrize("when", ["before folding", "after folding"])
def test_a_convolution_that_is_changed_computes_what_it_says(change, when):
    net = NETS["unet"]().double().requires_grad_(False)
    if when == "after folding":
        net.fold(FoldOptions(conv="library"))
    convs = [m for n, m in net.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    for conv in convs:
        conv._reversed_padding_repeated_twice = [1] * 4
        if change == "padding_mode":
            conv.padding_mode = "circular"
        elif change == "dilation":
            conv.dilation = conv.padding = (2, 2)
        else:
            conv._conv_forward = lambda x, w, b: F.conv2d(F.pad(x, [1] * 4, mode="circular"), w, b)
    if when == "before folding":
        net.fold(FoldOptions(conv="library"))
    with Watch(net) as seen:
        call(net)
    conv = net.middle_block[0].in_layers[2]
    (x,), out = seen["middle_block.0.in_layers.2"]
    if change == "dilation":
        alone = F.conv2d(x, conv.weight, conv.bias, padding=2, dilation=2)
    else:
        alone = F.conv2d(F.pad(x, [1] * 4, mode="circular"), conv.weight, conv.bias)
    torch.testing.assert_close(out, alone, **FLOAT64)
    fused = call(net)
    net.unfold()
    torch.testing.assert_close(fused, call(net), **FLOAT64)


def test_a_whole_block_may_be_replaced():
    net, wanted = folded(), folded()

    class Outer(type(net.middle_block)):
        """A sequence around another one, called with the embedding like the published sequences."""

        def forward(self, x: Tensor, emb: Tensor) -> Tensor:
            assert isinstance(emb, Tensor)
            return self[0](x, emb)

    net.output_blocks[0] = Outer(net.output_blocks[0])
    net.middle_block[0] = Outer(net.middle_block[0])
    torch.testing.assert_close(call(net), call(wanted), **FLOAT64)


def test_parts_are_named_and_ordered_as_published():
    net = unet(resblock_updown=True)
    block = net.input_blocks[2][0]
    parts = ["in_layers", "h_upd", "x_upd", "emb_layers", "out_layers", "skip_connection"]
    assert [name for name, _ in block.named_children()] == parts
    assert [name for name, _ in net.middle_block[0].named_children()] == [p for p in parts if p != "x_upd"]
    assert [name for name, _ in net.middle_block[1].named_children()] == [
        "norm",
        "qkv",
        "attention",
        "proj_out",
    ]
    pool = classifier(pool="attention").out[2]
    assert [name for name, _ in pool.named_children()] == ["qkv_proj", "c_proj", "attention"]
    assert "op" in dict(block.h_upd.named_children())


def test_copies_and_slices_run():
    net = folded()
    copied = copy.deepcopy(net)
    with Watch(copied) as seen:
        torch.testing.assert_close(call(copied), call(net), **FLOAT64)
    x = seen["out"][0][0]
    torch.testing.assert_close(net.out[1:](net.out[0](x)), net.out(x), **FLOAT64)
    torch.testing.assert_close(net.out[2](net.out[:2](x)), net.out(x), **FLOAT64)
