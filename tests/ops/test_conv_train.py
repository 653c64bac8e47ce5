"""Tests of the convolution with trainable weights: accuracy of every implementation, and the selection."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from admfast.errors import InvalidArgument, Unavailable
from admfast.ops import TABLES, conv, native, record_choices
from admfast.ops.cases import all_cases
from admfast.ops.conv.winograd import amplification, gradient_amplification
from tests.ops.cover import all_pairs, case_id, laid_out
from tests.ops.tolerance import HALF_AND_SINGLE, assert_within, unmodified

pytestmark = pytest.mark.usefixtures("seeded")
CALLS = next(cases for cases in all_cases() if cases.op == "conv_train")
TABLE = TABLES["conv_train"]
WITHOUT_C = native.reason_missing()
needs_cpp = pytest.mark.skipif(WITHOUT_C is not None, reason=f"{WITHOUT_C}")
# name: (batch, C_in, C_out, spatial, kernel, stride, padding)
SHAPES: dict[str, tuple] = {
    "odd": (1, 19, 37, (9, 7), 3, 1, 1),
    "stem": (2, 3, 40, (8, 12), 3, 1, 1),
    "head": (1, 40, 6, (12, 8), 3, 1, 1),
    "adm": (1, 192, 192, (32, 32), 3, 1, 1),
    "adm-low": (4, 96, 128, (8, 8), 3, 1, 1),  # 16 tiles: one panel of weights at a time
    "parts": (3, 17, 33, (57, 66), 3, 1, 1),  # 765 tiles: partial sums that are added at the end
    "blocks": (2, 320, 192, (21, 46), 3, 1, 1),  # 144 tiles, and sums too large for partial ones
    "one pixel": (3, 33, 32, (1, 1), 3, 1, 1),
    "two rows": (2, 16, 65, (2, 5), 3, 1, 1),
    "1x1": (2, 24, 72, (5, 6), 1, 1, 0),
    "stride 2": (2, 16, 24, (9, 8), 3, 2, 1),
    "1d": (2, 10, 14, (11,), 3, 1, 1),
    "3d": (1, 6, 5, (3, 6, 4), 3, (1, 2, 2), 1),
}
GROWTH = {"winograd": (amplification(), gradient_amplification())}


def call_of(
    name: str, mean: float, layout: str, residual: bool
) -> tuple[dict[str, Tensor], dict[str, Any], Tensor]:
    """Return the tensors, the geometry and a gradient dy of a call. With mean 0, outputs are of order 1."""
    n, c_in, c_out, spatial, kernel, stride, padding = SHAPES[name]
    weight = torch.randn(c_out, c_in, *(kernel,) * len(spatial))
    tensors = {
        "x": laid_out(torch.randn(n, c_in, *spatial) + mean, layout),
        "weight": weight / weight[0].numel() ** 0.5,
        "bias": torch.randn(c_out),
    }
    geometry = dict(stride=stride, padding=padding)
    dy = torch.randn_like(conv(**tensors, **geometry, impl="reference"))
    if residual:
        tensors["residual"] = torch.randn_like(dy)
    return tensors, geometry, dy


def results(
    tensors: dict[str, Tensor], geometry: dict, dy: Tensor, dtype: torch.dtype, impl: str
) -> dict[str, Tensor]:
    """Return the output and the gradient of sum(y dy) in every tensor."""
    leaves = {name: t.detach().to(dtype).requires_grad_(True) for name, t in tensors.items()}
    y = conv(**leaves, **geometry, impl=impl)
    found = torch.autograd.grad(y, list(leaves.values()), dy.to(dtype))
    return {"y": y.detach(), **dict(zip(leaves, found, strict=True))}


def unserved(impl: str, tensors: dict[str, Tensor], geometry: dict) -> bool:
    """Tell whether `impl` can't run a call. If so, check that it raises."""
    x, weight = tensors["x"], tensors["weight"]
    dims = x.dim() - 2
    of_each = {name: (n,) * dims if isinstance(n, int) else n for name, n in geometry.items()}
    entry = TABLE.find(impl)
    if not (entry.reason_missing() or entry.reason_unsupported(x, weight, **of_each)):
        return False
    with pytest.raises(Unavailable, match=f"^impl='{impl}'"):
        conv(**tensors, **geometry, impl=impl)
    return True


CASES = all_pairs(
    shape=list(SHAPES),
    dtype=list(HALF_AND_SINGLE),
    mean=[0, 100],
    layout=["contiguous", "channels_last", "sliced"],
    residual=[False, True],
)
# For Winograd: every shape that it supports, in its only dtype.
CASES += [
    dict(shape=name, dtype="fp32", mean=mean, layout="channels_last", residual=True)
    for name, (*_, spatial, kernel, stride, _) in SHAPES.items()
    if (len(spatial), kernel, stride) == (2, 3, 1)
    for mean in (0, 100)
]


@pytest.mark.parametrize("impl", TABLE.names())
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_values_and_gradients_are_within_tolerance(case, impl, poisoned):
    name, dtype, mean, layout, residual = case.values()
    dtype = HALF_AND_SINGLE[dtype]
    tensors, geometry, dy = call_of(name, mean, layout, residual)
    tensors, dy = {k: t.to(dtype) for k, t in tensors.items()}, dy.to(dtype)
    if unserved(impl, tensors, geometry):
        return
    truth = results(tensors, geometry, dy, torch.float64, "reference")
    reference = results(tensors, geometry, dy, dtype, "library" if impl == "library" else "reference")
    with unmodified(dy=dy, **tensors):
        got = results(tensors, geometry, dy, dtype, impl)
    if layout != "sliced" and got["y"].dim() == 4:
        assert (got["y"].movedim(1, -1) if layout == "channels_last" else got["y"]).is_contiguous()
    assert got["weight"].stride() == tensors["weight"].stride() or impl == "reference"
    forward, backward = GROWTH.get(impl, ((1, 1), (1, 1)))
    for name in truth:
        kind, growth, reduction = "output", forward, 1
        if name in ("weight", "bias"):
            kind, growth, reduction = "parameter gradient", backward, dy[:, 0].numel()
        elif name != "y":
            kind = "input gradient"
        growth = growth if name in ("y", "x", "weight") else (1, 1)
        assert_within(got[name], reference[name], truth[name], name, kind, reduction, growth=growth)


@needs_cpp
@pytest.mark.parametrize("name", ["adm", "adm-low", "parts", "blocks"])
def test_the_number_of_threads_changes_no_bit_of_output_and_weights_gradient(name):
    tensors, geometry, dy = call_of(name, 0, "channels_last", True)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(tensors, geometry, dy, torch.float32, "winograd"))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(found[0][key], other[key]) for key in ("y", "x", "weight", "residual"))


@needs_cpp
@pytest.mark.parametrize("wanted", [["x"], ["weight"], ["bias"], ["residual"], ["x", "bias"]], ids="+".join)
def test_only_the_gradients_that_are_asked_for_are_made(wanted):
    tensors, geometry, dy = call_of("odd", 0, "channels_last", True)
    all_of_them = results(tensors, geometry, dy, torch.float32, "winograd")
    leaves = {name: t.detach().requires_grad_(name in wanted) for name, t in tensors.items()}
    y = conv(**leaves, **geometry, impl="winograd")
    y.backward(dy)
    for name, leaf in leaves.items():
        assert leaf.grad is None if name not in wanted else torch.equal(leaf.grad, all_of_them[name])


@needs_cpp
def test_second_derivatives_are_torch_s():
    tensors, geometry, _ = call_of("odd", 0, "channels_last", False)

    def second(impl: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_(True) for t in tensors.values()]
        y = conv(*leaves, **geometry, impl=impl)
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))

    triples = zip(
        second("winograd", torch.float32),
        second("library", torch.float32),
        second("reference", torch.float64),
        strict=True,
    )
    for name, (got, reference, truth) in zip(tensors, triples, strict=True):
        terms = tensors["x"][0].numel() + tensors["weight"].numel()
        assert_within(got, reference, truth, name, "sum", terms, growth=amplification())


@needs_cpp
def test_a_checkpointed_call_gives_the_same_bits():
    tensors, geometry, dy = call_of("adm-low", 0, "channels_last", True)
    plain = results(tensors, geometry, dy, torch.float32, "winograd")
    leaves = {name: t.detach().requires_grad_(True) for name, t in tensors.items()}
    y = checkpoint(lambda *given: conv(*given, **geometry), *leaves.values(), use_reentrant=True)
    y.backward(dy)
    assert torch.equal(y, plain["y"])
    assert all(torch.equal(leaf.grad, plain[name]) for name, leaf in leaves.items())


def chosen(*args: Any, **kwargs: Any) -> str:
    with record_choices() as seen:
        conv(*args, **kwargs)
    return next(choice.name for choice in seen if choice.op == "conv_train")


@needs_cpp
def test_what_only_knows_torch_s_operations_gets_them():
    weight = torch.randn(32, 32, 3, 3, requires_grad=True)
    x = torch.randn(4, 32, 16, 16).to(memory_format=torch.channels_last)
    if native.ops().cpu_instruction_set() == "generic":
        pytest.skip("without vector instructions torch's own convolution is faster")
    assert chosen(x, weight, padding=1) == "winograd"
    with torch.no_grad():
        assert chosen(x, weight, padding=1) == "winograd"
    assert chosen(x.contiguous(), weight, padding=1) == "library"
    assert chosen(x.bfloat16(), weight.bfloat16(), padding=1) == "library"
    assert chosen(x, weight, padding=0) == "library"
    assert (
        chosen(x[:, :3].contiguous(memory_format=torch.channels_last), weight[:, :3], padding=1) == "library"
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert chosen(x, weight, padding=1) == "library"
        assert conv(x, weight, padding=1).dtype == torch.bfloat16
    with FlopCounterMode(display=False) as counter:
        assert chosen(x, weight, padding=1) == "library"
    assert counter.get_total_flops() == 2 * 4 * 16 * 16 * 32 * 32 * 9


@needs_cpp
def test_a_counter_round_the_backward_pass_counts_it():
    weight = torch.randn(32, 32, 3, 3, requires_grad=True)
    x = torch.randn(4, 32, 16, 16).to(memory_format=torch.channels_last).requires_grad_(True)
    total = conv(x, weight, padding=1, impl="winograd").sum()
    with FlopCounterMode(display=False) as counter:
        total.backward()
    assert counter.get_total_flops() == 2 * 2 * 4 * 16 * 16 * 32 * 32 * 9


@needs_cpp
def test_transforms_and_compilation_give_the_library_s_numbers():
    weight = torch.randn(32, 32, 3, 3)
    x = torch.randn(4, 32, 16, 16).to(memory_format=torch.channels_last)
    library = conv(x, weight, padding=1, impl="library")
    compiled = torch.compile(lambda x, w: conv(x, w, padding=1), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, weight), library)
    per_image = torch.func.vmap(lambda image: conv(image[None], weight, padding=1)[0])(x)
    torch.testing.assert_close(per_image, library)
    gradient = torch.func.grad(lambda w: conv(x, w, padding=1).sum())(weight)
    leaf = weight.requires_grad_(True)
    conv(x, leaf, padding=1, impl="library").sum().backward()
    torch.testing.assert_close(gradient, leaf.grad)


WRONG = [case for case in CALLS.wrong() if not case[1].endswith(".device")]


@pytest.mark.parametrize(("changes", "name"), WRONG, ids=[f"{i}-{name}" for i, (_, name) in enumerate(WRONG)])
def test_what_does_not_fit_is_refused_by_name_without_values(changes, name):
    call = CALLS.arguments(torch.ones, torch.float32) | changes
    with FakeTensorMode() as mode, pytest.raises(InvalidArgument, match=f"^{re.escape(name)}[=.]"):
        conv(**{key: mode.from_tensor(t) if isinstance(t, Tensor) else t for key, t in call.items()})


def test_an_unknown_implementation_is_refused():
    with pytest.raises(InvalidArgument, match="^impl="):
        conv(torch.ones(1, 6, 4, 4), torch.ones(4, 6, 3, 3), impl="fastest")


def test_a_residual_is_measured_against_the_output():
    x, weight = torch.ones(2, 6, 8, 8), torch.ones(6, 6, 3, 3)
    right = torch.ones(2, 6, 4, 4)
    assert torch.equal(
        conv(x, weight, None, right, stride=2, padding=1), 1 + conv(x, weight, stride=2, padding=1)
    )
    with pytest.raises(InvalidArgument, match=r"^residual.shape=\(2, 6, 8, 8\): .*\(2, 6, 4, 4\)"):
        conv(x, weight, None, x, stride=2, padding=1)
    compiled = torch.compile(lambda x, w, r: conv(x, w, None, r, padding=1), backend="eager")
    with pytest.raises(InvalidArgument, match="^residual.shape="):
        compiled(x, weight, right[:, :, :1, :1])


def test_autocast_brings_tensors_to_one_dtype():
    x, weight = torch.randn(1, 6, 4, 4), torch.randn(4, 6, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = conv(x.bfloat16(), weight, padding=1)
        assert torch.equal(mixed, conv(x, weight, padding=1)) and mixed.dtype == torch.bfloat16
        with pytest.raises(InvalidArgument, match="^residual.shape="):
            conv(x.bfloat16(), weight, None, torch.ones(1, 4, 1, 1), padding=1)


@needs_cpp
@pytest.mark.parametrize(
    ("x", "dy", "message"),
    [
        (torch.ones(1, 4, 4), torch.ones(1, 6, 4, 4), "x must be"),
        (torch.ones(1, 4, 4, 4).double(), torch.ones(1, 6, 4, 4), "x is Double"),
        (torch.ones(1, 4, 4, 4), torch.ones(1, 6, 4, 4).half(), "dy is Half"),
        (torch.ones(1, 4, 4, 4), torch.ones(1, 6, 4, 5), "dy must be"),
        (torch.ones(1, 4, 4, 4), torch.ones(2, 6, 4, 4), "dy must be"),
    ],
    ids=str,
)
def test_the_raw_gradient_refuses_what_does_not_fit(x, dy, message):
    with pytest.raises(RuntimeError, match=f"^conv3x3_winograd_weight_grad: {message}"):
        torch.ops.admfast.conv3x3_winograd_weight_grad(x, dy)


@needs_cpp
def test_the_raw_convolution_refuses_channels_that_do_not_fit():
    weight = torch.ones(6, 4, 3, 3)
    for transposed, channels in ((False, 6), (True, 4)):
        with pytest.raises(RuntimeError, match="^conv3x3_winograd_once: x has"):
            torch.ops.admfast.conv3x3_winograd_once(
                torch.ones(1, channels, 4, 4), weight, None, None, transposed
            )


@needs_cpp
@pytest.mark.parametrize("shape", [(0, 4, 4, 4), (2, 4, 0, 4)], ids=str)
def test_no_images_give_no_gradient(shape):
    x, dy = torch.ones(shape), torch.ones(shape[0], 6, *shape[2:])
    dw = torch.ops.admfast.conv3x3_winograd_weight_grad(x, dy)
    assert dw.shape == (6, 4, 3, 3) and not dw.any()
