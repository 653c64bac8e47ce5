"""Tests that a gradient through `predict` computes the gradient in the input only, and none of weights."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from admfast.engine.options import EngineOptions
from admfast.models.fold import FoldOptions
from tests.small import pipeline, randn

LABELS = [0, 2]


class Backwards(TorchDispatchMode):
    """A mode that records which gradients each convolution's backward computes: (input, weight, bias)."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[list[bool]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution_backward.default:
            self.masks.append(list(args[-1]))
        return function(*args, **(kwargs or {}))


def cost(fold: FoldOptions | None, **options) -> tuple[int, int, list]:
    """Return the FLOPs of a forward and of forward plus backward, and the masks that `Backwards` records."""
    pipe = pipeline(options=EngineOptions(fold=fold), **options)
    x = randn(2, 1, 8, 8)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        pipe.predict(x, 500, LABELS)
    x.requires_grad_(True)
    with Backwards() as seen, FlopCounterMode(display=False) as both:
        pipe.predict(x, 500, LABELS).x0.square().sum().backward()
    return forward.get_total_flops(), both.get_total_flops(), seen.masks


@pytest.mark.parametrize("fold", [None, FoldOptions(conv="library")], ids=["unfolded", "folded"])
def test_a_gradient_costs_the_forward_once_more_and_no_weight_s(fold):
    forward, both, masks = cost(fold)
    # Input gradients cost as much as the forward; weight gradients would cost the same again. Attention's
    # backward has five products where its forward has two.
    assert forward < both <= 2.2 * forward
    assert masks and not any(mask[1] or mask[2] for mask in masks)


def test_gradients_again_and_again():
    pipe = pipeline()
    x = randn(2, 1, 8, 8).requires_grad_(True)
    out = pipe.predict(x, 500, LABELS).x0.sum()
    first, second = (torch.autograd.grad(out, x, retain_graph=True)[0] for _ in range(2))
    third = torch.autograd.grad(pipe.predict(x, 500, LABELS).x0.sum(), x)[0]
    assert torch.equal(first, second) and torch.equal(first, third) and bool(first.any())


def test_sampling_between_a_forward_and_its_backward_leaves_the_gradient():
    pipe = pipeline()
    x = randn(2, 1, 8, 8).requires_grad_(True)
    wanted = torch.autograd.grad(pipe.predict(x, 500, LABELS).x0.sum(), x)[0]
    out = pipe.predict(x, 500, LABELS).x0.sum()
    pipe.sample(LABELS, [1, 2])
    assert torch.equal(torch.autograd.grad(out, x)[0], wanted)
