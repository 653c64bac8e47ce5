"""Tests of folded networks with trainable parameters: the requested gradients are computed, no others."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from admfast.models.fold import FoldOptions
from admfast.ops.conv.winograd import amplification
from tests.models.test_fold import NETS, N, T, Y
from tests.ops.tolerance import assert_within
from tests.small import assert_close, randn, unet

WEIGHT_GRADIENTS = ("admfast::conv3x3_winograd_weight_grad", "aten::convolution_backward")


def folded(net: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    net = copy.deepcopy(net).to(dtype).eval()
    net.ensure_folded(FoldOptions(), dtype)
    assert net.is_folded
    return net


def given(net: nn.Module, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    config = net.config
    x = randn(N, config.in_channels, *[config.image_size] * config.dims).to(dtype).requires_grad_(True)
    more = {"y": Y} if getattr(config, "num_classes", None) is not None else {}
    if config.kind == "upsampler":
        more["low_res"] = randn(N, config.in_channels, *[4] * config.dims, seed=1).to(dtype)
    return x, more


def gradients(net: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return the gradients in x and all parameters of the output's product with fixed noise."""
    x, more = given(net, dtype)
    out = net(x, T, **more)
    (out * randn(*out.shape, seed=2).to(dtype)).sum().backward()
    found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return {"x": x.grad, **found}


@pytest.mark.parametrize("name", [*NETS])
def test_every_parameter_gets_its_gradient(name):
    net = NETS[name]().requires_grad_(True)
    plain, got = gradients(copy.deepcopy(net)), gradients(folded(net))
    truth = gradients(copy.deepcopy(net).double(), torch.float64)
    assert got.keys() == truth.keys() and len(got) == 1 + len(list(net.parameters()))
    growth = amplification()
    for key, value in got.items():
        kind = "input gradient" if key == "x" else "parameter gradient"
        terms = N * net.config.image_size**net.config.dims * 9  # a parameter is used at all positions
        assert_within(value, plain[key], truth[key], f"{name} {key}", kind, terms, growth=growth)


def ops_of(backward) -> set[str]:
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        backward()
    return {event.name for event in seen.events()} & set(WEIGHT_GRADIENTS)


@pytest.mark.parametrize("train", [False, True], ids=["folded", "training"])
def test_weights_whose_gradient_nobody_wants_cost_nothing(train):
    net = unet(model_channels=32, image_size=16).requires_grad_(True).train(train)
    net = net if train else folded(net)
    x, more = given(net, torch.float32)
    loss = net(x, T, **more).square().sum()
    keep = {"retain_graph": True}
    assert not ops_of(lambda: torch.autograd.grad(loss, x, **keep)) & {WEIGHT_GRADIENTS[0]}
    assert WEIGHT_GRADIENTS[0] in ops_of(lambda: loss.backward(**keep))
    weight = net.middle_block[0].in_layers[2].weight
    (one,) = torch.autograd.grad(loss, weight, **keep)
    assert torch.equal(one, weight.grad)
    loss.backward(inputs=[x])
    assert torch.equal(one, weight.grad)


def test_frozen_parameters_among_trainable_ones_get_none():
    """Some programs train only the attention and the norms."""
    net = unet()
    wanted = gradients(copy.deepcopy(net).requires_grad_(True))
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(any(part in name for part in ("qkv", "norm", "proj")))
    got = gradients(folded(net))
    assert got.keys() == {"x"} | {name for name, p in net.named_parameters() if p.requires_grad}
    for key, value in got.items():
        assert_close(value, wanted[key])


def test_second_derivatives_reach_the_parameters():
    def penalty(net: nn.Module) -> dict[str, Tensor]:
        x, more = given(net, torch.float64)
        (g,) = torch.autograd.grad(net(x, T, **more).square().sum(), x, create_graph=True)
        g.square().sum().backward()
        return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}

    net = unet().requires_grad_(True).double()
    wanted, got = penalty(copy.deepcopy(net)), penalty(folded(net, torch.float64))
    assert got.keys() == wanted.keys()
    for key, value in got.items():
        torch.testing.assert_close(value, wanted[key])


def test_transforms_see_constants_where_nothing_is_recorded_and_parameters_where_it_is():
    net = unet().requires_grad_(True)
    plain, fast = copy.deepcopy(net), folded(net)
    x, more = given(net, torch.float32)
    x, v = x.detach(), randn(*x.shape[:1], 2 * x.shape[1], *x.shape[2:], seed=3)[:, : net.config.out_channels]

    def pulled(network: nn.Module) -> Tensor:
        return torch.func.vjp(lambda x: network(x, T, **more), x)[1](v)[0]

    with torch.no_grad():
        assert_close(pulled(fast), pulled(plain))
    for network in (plain, fast):
        pulled(network).square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), fast.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            assert_close(b.grad, a.grad)


def test_an_optimiser_in_evaluation_mode_is_seen_at_every_step():
    net = unet().requires_grad_(True)
    plain, fast = copy.deepcopy(net).eval(), folded(net)
    for network in (plain, fast):
        optimiser = torch.optim.SGD(network.parameters(), lr=1e-3)
        for _ in range(3):
            optimiser.zero_grad()
            gradients(network)
            optimiser.step()
    x, more = given(net, torch.float32)
    with torch.no_grad():
        assert_close(fast(x, T, **more), plain(x, T, **more))


def test_a_network_that_trains_drops_its_forms():
    net = folded(unet().requires_grad_(True)).train()
    x, more = given(net, torch.float32)
    net(x, T, **more)
    assert net.fold_options is not None  # no parameter was written yet
    with torch.no_grad():
        net.out[2].bias.add_(1.0)
    net(x, T, **more)
    assert net.fold_options is None


@pytest.mark.parametrize("trainable", [True, False])
def test_forms_renewed_before_the_backward_pass_are_not_used_in_it(trainable):
    """The forward pass saves trainable weights, which give its gradient. Frozen weights raise an error."""
    net = unet().requires_grad_(True)
    plain, fast = copy.deepcopy(net), folded(net).requires_grad_(trainable)
    grads = []
    for one in (plain, fast):
        x, more = given(one, torch.float32)
        loss = one(x, T, **more).square().sum()
        with torch.no_grad():
            for parameter in list(one.parameters()):
                parameter.data = 2 * parameter.data
            if one is fast:
                one.ensure_folded(FoldOptions(), torch.float32)
            one(x, T, **more)
        if one is fast and not trainable:
            with pytest.raises(RuntimeError, match="between the forward and the backward"):
                torch.autograd.grad(loss, x)
            return
        grads.append(torch.autograd.grad(loss, x)[0])
    assert_close(grads[1], grads[0])
