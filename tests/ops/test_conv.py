"""Tests of every implementation of the convolution against the reference: values, gradients, layouts."""

from __future__ import annotations

import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from admfast.errors import Unavailable
from admfast.ops import TABLES, FoldedConv, conv_ref
from admfast.ops.conv.winograd import amplification
from tests.ops.cover import all_pairs, case_id, dtype_of, laid_out
from tests.ops.tolerance import DEVICES, HALF_AND_SINGLE, assert_same_formula, assert_within, unmodified

pytestmark = pytest.mark.usefixtures("seeded")
TABLE = TABLES["conv"]
IMPLEMENTATIONS = TABLE.names()
# name: (batch, C_in, C_out, spatial, kernel, stride, padding)
SHAPES: dict[str, tuple] = {
    "odd": (1, 19, 37, (9, 7), 3, 1, 1),
    "stem": (2, 3, 40, (8, 12), 3, 1, 1),
    "head": (1, 40, 6, (12, 8), 3, 1, 1),
    "adm": (1, 192, 192, (32, 32), 3, 1, 1),
    "adm-low": (2, 384, 192, (8, 8), 3, 1, 1),
    "blocks": (1, 17, 33, (57, 66), 3, 1, 1),  # 255 tiles: blocks of 128 and 127
    "one pixel": (3, 33, 32, (1, 1), 3, 1, 1),
    "two rows": (2, 16, 65, (2, 5), 3, 1, 1),
    "1x1": (2, 24, 72, (5, 6), 1, 1, 0),
    "rows of 16": (2, 40, 33, (5, 16), 3, 1, 1),  # rows of whole groups of `direct`
    "1x1 in place": (2, 64, 40, (4, 6), 1, 1, 0),  # whole groups and chunks: `direct` reads x in place
    "1x1 stride 2": (2, 16, 20, (5, 6), 1, 2, 0),
    "1x1 padded": (1, 8, 6, (4, 5), 1, 1, 1),
    "5x5": (1, 7, 9, (8, 6), 5, 1, 2),
    "flat": (1, 8, 6, (5, 9), (1, 3), 1, (0, 1)),
    "no padding": (2, 12, 20, (6, 5), 3, 1, 0),
    "stride 2": (2, 16, 24, (9, 8), 3, 2, 1),
    "1d": (2, 10, 14, (11,), 3, 1, 1),
    "1d 1x1": (3, 16, 48, (7,), 1, 1, 0),
    "tokens": (1, 96, 70, (32,), 1, 1, 0),
    "3d": (1, 6, 5, (3, 6, 4), 3, (1, 2, 2), 1),
}
CASES = all_pairs(
    shape=list(SHAPES),
    dtype=list(HALF_AND_SINGLE),
    mean=[0, 100],
    layout=["contiguous", "channels_last", "sliced", "expanded"],
    bias=[False, True],
    residual=[None, "contiguous", "channels_last"],
)
# For Winograd and for the direct convolution: every shape that they support, in their only dtypes.
KERNELS = {name: (len(spatial), *geometry) for name, (_, _, _, spatial, *geometry) in SHAPES.items()}
CASES += [
    dict(shape=name, dtype=dtype, mean=mean, layout="channels_last", bias=True, residual="channels_last")
    for name, (dims, *geometry) in KERNELS.items()
    for dtype in ("fp32", "bf16")
    if (dims, *geometry) == (2, 3, 1, 1) or (dtype == "bf16" and geometry == [1, 1, 0])
    for mean in (0, 100)
]
CASE_IDS = [f"{i}-{case_id(case)}" for i, case in enumerate(CASES)]
# Winograd's transforms make the terms of the sum larger by these factors, for the worst of the 16 outputs and
# in rms. Their rounding errors, and so the limits, grow by the same factors.
GROWTH = {"winograd": amplification()}
# These run channels-last. There the library adds all products one after the other, with three times the
# error of its channels-first convolution, which adds 16 at a time. So their reference runs channels-last too.
CHANNELS_LAST = ("packed", "library", "matmul")


def call_of(case: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return a case's weight and bias, x and residual, and geometry. With mean 0, outputs are of order 1."""
    generator = torch.Generator().manual_seed(0)
    n, c_in, c_out, spatial, kernel, stride, padding = SHAPES[case["shape"]]
    dtype = HALF_AND_SINGLE[case["dtype"]]
    kernel = (kernel,) * len(spatial) if isinstance(kernel, int) else kernel

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weight = randn(c_out, c_in, *kernel)
    weights = {"weight": (weight / weight[0].numel() ** 0.5).to(dtype)}
    weights["bias"] = randn(c_out).to(dtype) if case["bias"] else None
    tensors = {"x": laid_out((randn(n, c_in, *spatial) + case["mean"]).to(dtype), case["layout"])}
    geometry = dict(stride=stride, padding=padding)
    if case["residual"]:
        shape = conv_ref(tensors["x"], weights["weight"], **geometry).shape
        tensors["residual"] = laid_out(randn(*shape).to(dtype), case["residual"])
    return weights, tensors, geometry


def moved(tensors: dict[str, Any], *to: Any) -> dict[str, Any]:
    return {name: None if t is None else t.to(*to) for name, t in tensors.items()}


def channels_last(tensors: dict[str, Any]) -> dict[str, Any]:
    """Return the tensors, with those of three or more dimensions channels-last."""
    return {k: t if t is None or t.dim() < 3 else laid_out(t, "channels_last") for k, t in tensors.items()}


def folded(impl: str | None, weights: dict[str, Any], tensors: dict[str, Any], geometry: dict) -> Any:
    """Return the convolution by `impl`. If it can't run the call, check that it raises, and return None."""
    conv = FoldedConv(**weights, **geometry, impl=impl)
    entry = TABLE.find(impl or "reference")
    if entry.reason_missing() or entry.reason_unsupported(conv.directions[0], tensors["x"]):
        with pytest.raises(Unavailable, match=f"^impl='{impl}'"):
            conv(**tensors)
        return None
    return conv


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_the_reference_is_the_sum(case):
    weights, tensors, geometry = call_of(case)

    def formula(dtype: torch.dtype) -> Tensor:
        x, weight = tensors["x"].to(dtype), weights["weight"].to(dtype)
        dims = x.dim() - 2
        stride, padding = (
            (v,) * dims if isinstance(v, int) else v for v in (geometry["stride"], geometry["padding"])
        )
        patches = F.pad(x, [p for size in reversed(padding) for p in (size, size)])
        for dim in range(dims):
            patches = patches.unfold(2 + dim, weight.shape[2 + dim], stride[dim])
        y = torch.tensordot(patches, weight, ([1, *range(-dims, 0)], [1, *range(2, 2 + dims)])).movedim(-1, 1)
        y = y if weights["bias"] is None else y + weights["bias"].to(dtype).view(-1, *(1,) * dims)
        return y + tensors["residual"].to(dtype) if "residual" in tensors else y

    # Two orders of the sum differ by the rounding of that many terms, which shrinks with eps. An error from
    # an intermediate float32 result would not shrink.
    terms = weights["weight"][0].numel()
    assert_same_formula(
        lambda dtype: FoldedConv(**moved(weights, dtype), **geometry, impl="reference")(
            **moved(tensors, dtype)
        ),
        formula,
        case["shape"],
        "sum",
        terms,
    )


def gradients(function: Any, tensors: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    """Return the gradient of sum(y dy) in every tensor."""
    leaves = {name: t.detach().requires_grad_(True) for name, t in tensors.items()}
    return dict(zip(leaves, torch.autograd.grad(function(**leaves), list(leaves.values()), dy), strict=True))


@functools.cache
def expected(
    index: int, wide: bool, last: bool, device: str = "cpu"
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the reference's output for a case, the output gradient dy, and the gradients for that dy."""
    weights, tensors, geometry = call_of(CASES[index])
    dtype = torch.float64 if wide else tensors["x"].dtype
    fixed, given = (moved(moved(t, dtype), device) for t in (weights, tensors))
    if last:
        fixed, given = channels_last(fixed), channels_last(given)
    y = conv_ref(**given, **fixed, **geometry)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(tensors["x"].dtype)
    found = gradients(lambda **k: conv_ref(**k, **fixed, **geometry), given, dy.to(device, dtype))
    return y.cpu(), dy, {name: gradient.cpu() for name, gradient in found.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("index", range(len(CASES)), ids=CASE_IDS)
def test_values_and_gradients_are_within_tolerance(index, impl, device, poisoned):
    weights, tensors, geometry = call_of(CASES[index])
    there, fixed = moved(tensors, device), moved(weights, device)
    conv = folded(impl, fixed, there, geometry)
    if conv is None:
        return
    # Each device sums in its own order, so the reference's error is measured on the same device.
    reference, dy, its_gradients = expected(index, False, impl in CHANNELS_LAST, device)
    truth, _, true_gradients = expected(index, True, False)
    growth = GROWTH.get(impl, (1, 1))
    with unmodified(dy=dy, **there, **fixed):
        y = conv(**there)
        got = gradients(conv, there, dy.to(device))
    assert y.dtype == tensors["x"].dtype and y.device.type == device
    last = there["x"].movedim(1, -1).is_contiguous()
    assert (y.movedim(1, -1) if last else y).is_contiguous()
    assert_within(y.cpu(), reference, truth, impl, growth=growth)
    for name in tensors:
        grown = growth if name == "x" else (1, 1)
        given = (got[name].cpu(), its_gradients[name], true_gradients[name])
        assert_within(*given, name, "input gradient", growth=grown)


SMALL = {"two rows": (2, 3), "1x1": (2, 3), "stride 2": (3, 4), "1d": (4,), "3d": (2, 2, 3)}


@pytest.mark.parametrize("impl", ["library", "matmul", "reference", None])
@pytest.mark.parametrize("name", SMALL)
def test_first_and_second_derivatives(name, impl):
    *_, kernel, stride, padding = SHAPES[name]
    geometry = dict(stride=stride, padding=padding)
    dims = len(SMALL[name])
    weight, bias = torch.randn(2, 2, *(kernel,) * dims).double(), torch.randn(2).double()
    x = laid_out(torch.randn(1, 2, *SMALL[name]).double(), "channels_last")
    tensors = {"x": x, "residual": torch.randn_like(conv_ref(x, weight, **geometry))}
    conv = folded(impl, {"weight": weight, "bias": bias}, tensors, geometry)
    if conv is None:
        return
    leaves = [t.requires_grad_(True) for t in tensors.values()]
    assert torch.autograd.gradcheck(conv, leaves)
    assert torch.autograd.gradgradcheck(conv, leaves, fast_mode=True)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_nan_stays_among_its_neighbours_and_in_its_tile(impl):
    dtype = dtype_of("conv", impl)
    weights = {"weight": torch.randn(32, 16, 3, 3).to(dtype), "bias": None}
    x = torch.randn(1, 16, 11, 13).to(dtype, memory_format=torch.channels_last)
    conv = folded(impl, weights, {"x": x}, dict(padding=1))
    if conv is None:
        return
    clean = conv(x)
    for row, column in ((0, 0), (3, 4), (5, 6), (10, 12), (7, 3)):
        for value in (float("nan"), float("inf")):
            spoilt = x.clone(memory_format=torch.preserve_format)
            spoilt[0, 5, row, column] = value
            y = conv(spoilt)
            reach = torch.zeros(11, 13, dtype=torch.bool)
            near = [range(max(at - 1, 0), at + 2) for at in (row, column)]
            if impl == "winograd":  # its own 4x4 tile, and the neighbours beyond it
                near = [
                    {*own, *range(at // 4 * 4, at // 4 * 4 + 4)}
                    for own, at in zip(near, (row, column), strict=True)
                ]
            for i in near[0]:
                for j in near[1]:
                    reach[i : i + 1, j : j + 1] = True
            assert torch.equal(y[..., ~reach], clean[..., ~reach]), (row, column)
            assert not y[..., reach].isfinite().any(), (row, column)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_what_was_in_the_buffers_before_does_not_matter(impl):
    dtype = dtype_of("conv", impl)
    weights = {"weight": torch.randn(40, 20, 3, 3).to(dtype), "bias": None}
    x = torch.randn(2, 20, 9, 9).to(dtype, memory_format=torch.channels_last)
    conv = folded(impl, weights, {"x": x}, dict(padding=1))
    if conv is not None:
        clean = conv(x)
        assert conv(torch.full_like(x, float("nan"))).isnan().all()
        assert torch.equal(conv(x), clean)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(0, 16, 8, 8), (1, 16, 1, 1)], ids=str)
def test_edges(impl, shape):
    dtype = dtype_of("conv", impl)
    weights = {"weight": torch.randn(32, 16, 3, 3).to(dtype), "bias": torch.randn(32).to(dtype)}
    x = torch.randn(shape).to(dtype).requires_grad_(True)
    conv = folded(impl, weights, {"x": x}, dict(padding=1))
    if conv is None:
        return
    y = conv(x, torch.ones(shape[0], 32, *shape[2:]).to(dtype))
    assert y.shape == (shape[0], 32, *shape[2:])
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.shape == x.shape


@pytest.mark.skipif(TABLE.find("winograd").reason_missing() is not None, reason="no compiled ops")
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(
    ("impl", "kernel", "width"),
    [("winograd", 3, 22), ("direct", 3, 22), ("direct", 3, 16), ("direct", 1, 22)],
)
def test_a_batch_is_its_images_bit_for_bit(impl, kernel, width, count, threads):
    dtype = dtype_of("conv", impl)
    weight, bias = torch.randn(70, 40, kernel, kernel).to(dtype), torch.randn(70).to(dtype)
    conv = FoldedConv(weight, bias, padding=kernel // 2, impl=impl)
    # In Winograd's convolution, all images have 210 tiles, so each thread has its own blocks. One image has
    # 30 tiles, a block that all threads share. The direct convolution has blocks of fewer positions for more
    # threads.
    x, residual = (
        torch.randn(7, c, 18, width).to(dtype, memory_format=torch.channels_last) for c in (40, 70)
    )
    threads(1)
    expected = conv(x, residual)
    threads(count)
    assert torch.equal(conv(x, residual), expected)
    parts = [conv(x[i : i + 1], residual[i : i + 1]) for i in range(7)]
    assert torch.equal(torch.cat(parts), expected)


WEIGHT, BIAS = torch.ones(6, 4, 3, 3), torch.zeros(6)


def test_threads_that_need_a_form_at_once_get_one():
    conv = FoldedConv(torch.randn(4, 3, 3, 3), padding=1)
    direction, both = conv.directions[0], threading.Barrier(2, timeout=30)

    class Forms(dict):
        looks = threading.local()

        def get(self, key):
            found, seen = super().get(key), getattr(self.looks, "seen", False)
            self.looks.seen = True
            if not seen:
                both.wait()  # both threads look before either makes the form
            return found

    direction.forms = Forms()
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(direction.form, ["library"] * 2)
    assert first is second
