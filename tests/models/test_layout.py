"""Tests of memory layouts: parameters and gradients like the published ones, images channels-last."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.utils import prune

from tests.small import assert_close, randn, unet

T, Y = torch.tensor([20, 700]), torch.tensor([1, 3])
NETS = {"1d": {"dims": 1}, "2d": {}, "2d colour": {"in_channels": 3, "out_channels": 6}, "3d": {"dims": 3}}


def batch(net) -> Tensor:
    return randn(2, net.config.in_channels, *[8] * net.config.dims)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("by", ["backward", "grad", "torch.func"])
def test_gradients_lie_as_their_parameters(name, by):
    net = unet(**NETS[name])
    x, parameters = batch(net), dict(net.named_parameters())

    def loss(given: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(net, given, (x, T, Y)).square().mean()

    if by == "backward":
        net(x, T, Y).square().mean().backward()
        gradients = [p.grad for p in parameters.values()]
    elif by == "grad":
        gradients = list(torch.autograd.grad(net(x, T, Y).square().mean(), list(parameters.values())))
    else:
        gradients = list(torch.func.grad(loss)(parameters).values())
    assert all(g.is_contiguous() for g in gradients)
    vector = torch.nn.utils.parameters_to_vector(gradients)
    assert vector.numel() == sum(p.numel() for p in parameters.values())


@pytest.mark.parametrize(
    "name, folded", [("2d", False), ("2d colour", False), ("2d", True), ("2d colour", True), ("3d", True)]
)
def test_images_run_with_their_channels_together(name, folded):
    net = unet(**NETS[name])
    seen = []
    net.middle_block[0].register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    if folded:
        net.requires_grad_(False).fold()
    net(batch(net), T, Y)
    assert seen[0].movedim(1, -1).is_contiguous() and not seen[0].is_contiguous()


def test_a_network_laid_out_by_its_user_is_the_same_function():
    net, other = unet(), unet().to(memory_format=torch.channels_last)
    for each in (net, other):
        each(batch(each), T, Y).square().mean().backward()
    with torch.no_grad():
        assert_close(other(batch(other), T, Y), net(batch(net), T, Y))
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert_close(b.grad, a.grad)


def test_a_pruned_layer_runs_on_what_is_left_of_its_weights():
    net, wanted = (unet().requires_grad_(False) for _ in range(2))
    net.fold()
    prune.l1_unstructured(net.middle_block[0].in_layers[2], "weight", 0.5)
    wanted.middle_block[0].in_layers[2].weight.mul_(net.middle_block[0].in_layers[2].weight_mask)
    assert_close(net(batch(net), T, Y), wanted(batch(net), T, Y))
