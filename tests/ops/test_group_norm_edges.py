"""The normalisation's edge cases: sources without channels, and every refusal by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from admfast.ops import TABLES, group_norm_silu
from tests.ops.test_group_norm import refused
from tests.ops.tolerance import assert_within

IMPLEMENTATIONS = TABLES["group_norm_silu"].names()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def with_gradients(tensors: dict[str, Tensor], options: dict[str, Any], impl: str) -> list[Tensor]:
    """The output and the gradient of its square in every tensor."""
    leaves = {name: t.detach().requires_grad_(True) for name, t in tensors.items()}
    y = group_norm_silu(**leaves, **options, impl=impl)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), list(leaves.values()))]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("empty", ["x", "x2"])
@pytest.mark.parametrize("resample", [None, "down"])
def test_a_source_without_channels_adds_nothing(impl, layout, empty, resample):
    full = torch.randn(2, 8, 4, 6).contiguous(memory_format=layout)
    none = torch.empty(2, 0, 4, 6).contiguous(memory_format=layout)
    tensors = {"x": none, "x2": full} if empty == "x" else {"x": full, "x2": none}
    tensors |= {"weight": torch.randn(8), "bias": torch.randn(8)}
    options = dict(groups=4, resample=resample)
    if refused(impl, tensors, options):
        return
    found = with_gradients(tensors, options, impl)
    assert [t.shape for t in found[1:]] == [t.shape for t in tensors.values()]
    alone = {"x": full, "weight": tensors["weight"], "bias": tensors["bias"]}
    reference = with_gradients(alone, options, "reference")
    truth = with_gradients({name: t.double() for name, t in alone.items()}, options, "reference")
    del found[1 if empty == "x" else 2]
    kinds = (("output", 1), ("input gradient", 1), *[("parameter gradient", full.numel() // 8)] * 2)
    for got, plain, exact, (kind, length) in zip(found, reference, truth, kinds, strict=True):
        assert_within(got, plain, exact, kind, kind, length)
