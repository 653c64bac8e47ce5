"""Tests of torch.func and torch.compile over the fused ops: derivatives are correct or refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from admfast.errors import Unavailable
from admfast.ops import FoldedConv, attention, group_norm_silu, native
from tests.ops.tolerance import assert_within

WITHOUT_C = native.reason_missing()
needs_cpp = pytest.mark.skipif(WITHOUT_C is not None, reason=f"compiled ops: {WITHOUT_C}")
WEIGHTS = {"weight": torch.randn(8), "bias": torch.randn(8)}
KERNEL = torch.randn(32, 16, 3, 3)


def norm(x: Tensor, impl: str | None) -> Tensor:
    return group_norm_silu(x, groups=4, **{n: t.to(x.dtype) for n, t in WEIGHTS.items()}, impl=impl)


CALLS = {
    "group_norm_silu": ((2, 8, 4, 6), lambda dtype, impl: lambda x: norm(x, impl)),
    "attention": ((2, 4, 12), lambda dtype, impl: lambda x: attention(x, 2, impl=impl)),
    "conv": ((2, 16, 16, 16), lambda dtype, impl: FoldedConv(KERNEL.to(dtype), padding=1, impl=impl)),
}


@pytest.mark.parametrize("op", CALLS)
def test_a_compiled_torch_func_gradient_is_the_eager_one(op):
    shape, call = CALLS[op]
    x = torch.randn(shape)

    def gradient(dtype: torch.dtype, impl: str | None):
        function = call(dtype, impl)
        return torch.func.grad(lambda x: function(x).square().sum())

    torch._dynamo.reset()
    got = torch.compile(gradient(x.dtype, None), backend="aot_eager")(x)
    plain, truth = gradient(x.dtype, "reference")(x), gradient(torch.float64, "reference")(x.double())
    assert_within(got, plain, truth, op, "input gradient")


@needs_cpp
def test_by_name_a_compiled_torch_func_gradient_is_refused():
    gradient = torch.func.grad(lambda x: norm(x, "cpp").sum())
    torch._dynamo.reset()
    with pytest.raises(Unavailable, match="impl='cpp'.*torch.func"):
        torch.compile(gradient, backend="eager", fullgraph=False)(torch.randn(2, 8, 4, 6))


@needs_cpp
@pytest.mark.parametrize("name", ["x", "weight", "bias", "scale", "shift", "x2"])
def test_a_forward_mode_derivative_in_any_tensor_goes_to_the_reference(name):
    torch.manual_seed(0)
    channels = {"x": (2, 4, 3, 5), "x2": (2, 4, 3, 5), "scale": (2, 8), "shift": (2, 8)}
    tensors = {n: torch.randn(channels.get(n, (8,))) for n in ("x", "weight", "bias", "scale", "shift", "x2")}

    def of(value: Tensor, impl: str | None = None) -> Tensor:
        return group_norm_silu(**(tensors | {name: value}), groups=4, impl=impl)

    direction = torch.randn_like(tensors[name])
    y, tangent = torch.func.jvp(of, (tensors[name],), (direction,))
    expected = torch.func.jvp(lambda t: of(t, "reference"), (tensors[name],), (direction,))
    assert torch.equal(y, expected[0]) and torch.equal(tangent, expected[1]) and bool(tangent.any())
    with pytest.raises(Unavailable, match="impl='cpp'.*forward-mode"):
        torch.func.jvp(lambda t: of(t, "cpp"), (tensors[name],), (direction,))
