"""Tests of the classifier's gradient: correct, without side effects, and never of the parameters."""

from __future__ import annotations

import pytest
import torch

from admfast.engine.guidance import classifier_guidance
from admfast.errors import InvalidArgument
from admfast.sampling.load import load
from tests.parity.golden import NETWORK_GRADIENT_LIMIT, compare
from tests.small import classifier, randn

T, LABELS = torch.tensor([10, 700, 999]), torch.tensor([0, 3, 1])


def by_hand(net: torch.nn.Module, x: torch.Tensor, scale: float) -> torch.Tensor:
    """Return scale * d log p(label | x) / dx, computed image by image in float64."""
    net = net.double()
    gradients = []
    for i in range(len(x)):
        one = x[i : i + 1].double().requires_grad_(True)
        logits = net(one, T[i : i + 1])
        log_probability = logits[0, LABELS[i]] - logits[0].exp().sum().log()
        log_probability.backward()
        gradients.append(scale * one.grad)
    net.float()
    return torch.cat(gradients)


@pytest.mark.parametrize("scale", [1.0, 4.0, -0.5])
def test_gradient_is_that_of_the_log_probability(scale):
    net, x = classifier().requires_grad_(False), randn(3, 1, 8, 8)
    g = classifier_guidance(net, LABELS, scale)(x, T)
    assert g.shape == x.shape and g.dtype == torch.float32 and not g.requires_grad
    compare(g, by_hand(net, x, scale), NETWORK_GRADIENT_LIMIT, "gradient")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad], ids=["no_grad", "enable_grad"])
def test_nothing_is_left_on_x_or_the_parameters(mode):
    net, x = classifier(use_checkpoint=True).requires_grad_(False), randn(3, 1, 8, 8)
    with mode():
        g = classifier_guidance(net, LABELS, 1.0)(x, T)
    assert not x.requires_grad and x.grad is None and g.grad_fn is None
    assert all(p.grad is None for p in net.parameters())


def test_no_gradient_of_a_parameter_is_computed():
    net, x = classifier().requires_grad_(False), randn(3, 1, 8, 8)
    seen = []
    for module in net.modules():
        module.register_forward_hook(lambda _m, _i, out: seen.append(out))
    classifier_guidance(net, LABELS, 1.0)(x, T)
    leaves = set()
    stack = [out.grad_fn for out in seen if isinstance(out, torch.Tensor)]
    visited = set()
    while stack:
        node = stack.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if hasattr(node, "variable"):
            leaves.add(node.variable.shape)
        stack.extend(parent for parent, _ in node.next_functions)
    assert leaves == {x.shape}, "leaves of the graph other than x"


@pytest.mark.parametrize("name", ["out.2.positional_embedding", "time_embed.0.bias"])
def test_a_classifier_with_anything_to_train_is_refused(name):
    net = classifier().requires_grad_(False)
    net.get_parameter(name).requires_grad_(True)
    with pytest.raises(InvalidArgument, match="classifier='trainable': freeze its parameters first"):
        classifier_guidance(net, LABELS, 1.0)


def test_float16_does_not_lose_small_gradients(monkeypatch):
    """For finished images the digits' classifier is so certain that most of its gradient is below 6e-8."""
    pipe = load("digits32", device="cpu", precision="fp32")
    x = pipe.sample([3, 7], [0, 1], steps=4, solver="ddim", output="float")
    t, labels = torch.zeros(2, dtype=torch.int64), torch.tensor([3, 7])
    exact = classifier_guidance(pipe.classifier, labels, 1.0)(x, t)
    half = load("digits32", device="cpu", precision="fp16").classifier

    def error() -> float:
        g = classifier_guidance(half, labels, 1.0)(x, t)
        return float((g - exact).norm() / exact.norm())

    assert error() < 5 * torch.finfo(torch.float16).eps
    monkeypatch.setattr("admfast.engine.guidance.LOSS_SCALE", 1.0)
    assert error() > 10 * torch.finfo(torch.float16).eps


def test_the_scale_of_the_loss_changes_no_bit(monkeypatch):
    net, x = classifier().requires_grad_(False), randn(3, 1, 8, 8)
    scaled = classifier_guidance(net, LABELS, 1.0)(x, T)
    monkeypatch.setattr("admfast.engine.guidance.LOSS_SCALE", 1.0)
    assert torch.equal(classifier_guidance(net, LABELS, 1.0)(x, T), scaled)


def test_half_precision_keeps_most_of_the_gradient():
    net, x = classifier().requires_grad_(False), randn(3, 1, 8, 8)
    exact = by_hand(net, x, 1.0)
    g = classifier_guidance(net.convert_torso(torch.bfloat16), LABELS, 1.0)(x, T)
    assert g.dtype == torch.float32
    # A few dozen layers each round once forward and once backward.
    error = (g - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt()
    assert 0 < error < 20 * torch.finfo(torch.bfloat16).eps
