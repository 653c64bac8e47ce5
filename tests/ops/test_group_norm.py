"""Tests of every implementation of the normalisation against its formula: values, gradients, layouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from admfast.errors import Unavailable
from admfast.ops import TABLES, group_norm_silu, group_norm_silu_ref
from tests.ops.cover import all_pairs, case_id, laid_out
from tests.ops.tolerance import DEVICES, HALF_AND_SINGLE, assert_same_formula, assert_within, unmodified

TABLE = TABLES["group_norm_silu"]
IMPLEMENTATIONS = TABLE.names()
# name: (batch, channels of x, channels of x2, groups, spatial)
SHAPES: dict[str, tuple[int, int, int, int, tuple[int, ...]]] = {
    "odd": (1, 24, 0, 8, (5, 7)),
    "G=1": (2, 6, 0, 1, (4, 5)),
    "G=C": (3, 6, 0, 6, (3, 4)),
    "adm": (1, 192, 0, 32, (64, 64)),
    "adm-skip": (2, 384, 192, 32, (8, 8)),  # groups of 18: one has the last 6 channels of x and 12 of x2
    "skip": (2, 5, 7, 3, (3, 4)),
    "1d": (2, 12, 0, 4, (9,)),
    "1d-skip": (1, 4, 6, 2, (6,)),
    "3d": (1, 8, 0, 2, (3, 5, 4)),
}
CASES = all_pairs(
    shape=list(SHAPES),
    dtype=list(HALF_AND_SINGLE),
    mean=[0, 100],
    layout=["contiguous", "channels_last", "sliced", "expanded"],
    modulated=[False, True],
    silu=[False, True],
    resample=[None, "up", "down"],
    weights=["fp32", "same"],
)
CASE_IDS = [f"{i}-{case_id(case)}" for i, case in enumerate(CASES)]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def formula(
    x: Tensor, weight, bias, groups=32, eps=1e-5, *, scale=None, shift=None, silu=True, resample=None, x2=None
) -> Tensor:
    """Compute GroupNorm, scale and shift, SiLU and resampling step by step, in the dtype of x."""
    source = x if x2 is None else torch.cat([x, x2], 1)
    values = source.reshape(source.shape[0], groups, -1)
    centred = values - values.mean(-1, keepdim=True)
    y = (centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()).reshape(source.shape)
    ones = (1,) * (x.dim() - 2)
    y = y * weight.view(1, -1, *ones) + bias.view(1, -1, *ones)
    if scale is not None:
        y = y * (1 + scale.view(*scale.shape, *ones)) + shift.view(*shift.shape, *ones)
    y = y / (1 + (-y).exp()) if silu else y
    for dim in range(3 if x.dim() == 5 else 2, x.dim()):
        if resample == "up":
            y = y.repeat_interleave(2, dim)
        elif resample == "down":
            y = y.narrow(dim, 0, y.shape[dim] // 2 * 2).unflatten(dim, (-1, 2)).mean(dim + 1)
    return y


def call_of(case: dict[str, Any], seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a case, and its other arguments."""
    generator = torch.Generator().manual_seed(seed)
    n, c1, c2, groups, spatial = SHAPES[case["shape"]]
    dtype = HALF_AND_SINGLE[case["dtype"]]

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {"x": laid_out((randn(n, c1, *spatial) + case["mean"]).to(dtype), case["layout"])}
    if c2:
        tensors["x2"] = laid_out((2 * randn(n, c2, *spatial) + case["mean"]).to(dtype), case["layout"])
    weights = torch.float32 if case["weights"] == "fp32" else dtype
    tensors |= {"weight": (1 + randn(c1 + c2)).to(weights), "bias": randn(c1 + c2).to(weights)}
    if case["modulated"]:
        # As in a network, these are two halves of one projection.
        scale, shift = randn(n, 2 * (c1 + c2)).to(dtype).chunk(2, dim=1)
        tensors |= {"scale": scale, "shift": shift}
    return tensors, dict(groups=groups, silu=case["silu"], resample=case["resample"])


def moved(tensors: dict[str, Tensor], *to: Any) -> dict[str, Tensor]:
    return {name: t.to(*to) for name, t in tensors.items()}


def refused(impl: str, tensors: dict[str, Tensor], options: dict[str, Any]) -> bool:
    """Tell whether `impl` can't run the call. If so, check that naming it raises an error."""
    entry = TABLE.find(impl)
    call = {**tensors, **options}
    arguments = [call.pop(name) for name in ("x", "weight", "bias", "groups")] + [call.pop("eps", 1e-5)]
    reason = entry.reason_missing() or entry.reason_unsupported(*arguments, **call)
    if reason:
        with pytest.raises(Unavailable, match=f"^impl='{impl}'"):
            group_norm_silu(**tensors, **options, impl=impl)
    return bool(reason)


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_the_reference_is_the_formula(case):
    tensors, options = call_of(case)
    assert_same_formula(
        lambda dtype: group_norm_silu(**moved(tensors, dtype), **options, impl="reference"),
        lambda dtype: formula(**moved(tensors, dtype), **options),
        case["shape"],
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_large_mean_costs_no_more_than_its_own_rounding(impl, layout, dims):
    # x = 100 + noise: E[x^2] - E[x]^2 as the variance would be off by 1e4 units in float32. The mean,
    # x / deviation and mean / deviation each cost half a unit at 100, because deviations are near 1.
    x = laid_out(torch.randn(2, 64, *(16,) * dims) + 100, layout)
    tensors, options = (
        {"x": x, "weight": torch.ones(64), "bias": torch.zeros(64)},
        dict(groups=32, silu=False),
    )
    if refused(impl, tensors, options):
        return
    truth = formula(**moved(tensors, torch.float64), **options)
    e = (group_norm_silu(**tensors, **options, impl=impl).double() - truth).abs()
    assert float(e.max()) <= 2 * 100 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_values_are_within_tolerance(case, impl, device):
    tensors, options = call_of(case)
    there = moved(tensors, device)
    if refused(impl, there, options):
        return
    with unmodified(**there):
        y = group_norm_silu(**there, **options, impl=impl)
    assert y.dtype == tensors["x"].dtype and y.device.type == device
    # Each device sums in its own order, so the reference's error is measured on the same device.
    reference = group_norm_silu_ref(**there, **options).cpu()
    assert_within(y.cpu(), reference, group_norm_silu_ref(**moved(tensors, torch.float64), **options), impl)


def gradients(function: Callable[..., Tensor], tensors, options, dy: Tensor) -> dict[str, Tensor]:
    """Return the gradient of sum(y dy) in every tensor."""
    leaves = {name: t.detach().requires_grad_(True) for name, t in tensors.items()}
    y = function(**leaves, **options)
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy.to(y)), strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_gradients_are_within_tolerance(case, impl, device):
    tensors, options = call_of(case)
    there = moved(tensors, device)
    if refused(impl, there, options):
        return
    wide = moved(tensors, torch.float64)
    shape = group_norm_silu_ref(**wide, **options).shape
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(tensors["x"].dtype)
    with unmodified(dy=dy, **there):
        got = gradients(lambda **k: group_norm_silu(**k, impl=impl), there, options, dy)
    reference = moved(gradients(group_norm_silu_ref, there, options, dy), "cpu")
    truth = gradients(group_norm_silu_ref, wide, options, dy)
    positions = tensors["x"][0, 0].numel()
    lengths = dict(weight=len(tensors["x"]) * positions, bias=len(tensors["x"]) * positions)
    lengths |= dict(scale=positions, shift=positions)
    for name in tensors:
        kind = "parameter gradient" if name in lengths else "input gradient"
        assert_within(got[name].cpu(), reference[name], truth[name], name, kind, lengths.get(name, 1))


SMALL = [
    dict(x=(2, 4, 3), groups=2),
    dict(x=(2, 4, 2, 3), groups=2, modulated=True),
    dict(x=(1, 3, 3, 2), x2=(1, 3, 3, 2), groups=2, modulated=True, resample="up"),
    dict(x=(1, 4, 2, 3, 2), groups=1, silu=False, resample="down"),
]


def small(shapes: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return small tensors in float64, and the other arguments."""
    generator = torch.Generator().manual_seed(0)
    options = {name: value for name, value in shapes.items() if name in ("groups", "silu", "resample")}
    channels = shapes["x"][1] + (shapes["x2"][1] if "x2" in shapes else 0)
    sizes = {name: shapes[name] for name in ("x", "x2") if name in shapes}
    sizes |= {"weight": (channels,), "bias": (channels,)}
    if shapes.get("modulated"):
        sizes |= {"scale": (shapes["x"][0], channels), "shift": (shapes["x"][0], channels)}
    double = {k: torch.randn(s, generator=generator, dtype=torch.float64) for k, s in sizes.items()}
    return double, options


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shapes", SMALL, ids=lambda shapes: str(shapes["x"]))
def test_first_and_second_derivatives(shapes, impl):
    tensors, options = small(shapes)
    if refused(impl, tensors, options):
        return
    leaves = [t.requires_grad_(True) for t in tensors.values()]

    def function(*values: Tensor) -> Tensor:
        return group_norm_silu(**dict(zip(tensors, values, strict=True)), **options, impl=impl)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_gradient_in_x_alone_by_every_road(impl):
    tensors, options = call_of(
        CASES[0] | dict(shape="skip", dtype="fp32", layout="channels_last", resample=None)
    )
    if refused(impl, tensors, options):
        return
    x = tensors.pop("x")

    def total(x: Tensor) -> Tensor:
        return group_norm_silu(x, **tensors, **options, impl=impl).square().sum()

    leaf = x.clone().requires_grad_(True)
    loss = total(leaf)
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(loss, leaf)
    checkpointed = torch.utils.checkpoint.checkpoint(total, leaf, use_reentrant=False)
    (third,) = torch.autograd.grad(checkpointed, leaf)
    _, vjp = torch.func.vjp(total, x)
    wide = {name: t.double() for name, t in tensors.items()}
    leaf = x.double().requires_grad_(True)
    (truth,) = torch.autograd.grad(group_norm_silu_ref(leaf, **wide, **options).square().sum(), leaf)
    assert torch.equal(second, first)
    for got in (first, third, torch.func.grad(total)(x), vjp(torch.ones(()))[0]):
        assert_within(got, first, truth, "dx", "input gradient")
    assert all(not t.requires_grad for t in tensors.values())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("which", ["y", "skip"])
def test_one_of_two_outputs_may_have_no_gradient(which, impl):
    tensors, options = call_of(
        CASES[0] | dict(shape="skip", dtype="fp32", layout="channels_last", resample="down")
    )
    options["with_skip"] = True
    if refused(impl, tensors, options):
        return
    x = tensors.pop("x").requires_grad_(True)
    wide = {name: t.double() for name, t in tensors.items()}
    wide_x = x.detach().double().requires_grad_(True)
    index = ["y", "skip"].index(which)
    (truth,) = torch.autograd.grad(
        group_norm_silu_ref(wide_x, **wide, **options)[index].square().sum(), wide_x
    )
    got, reference = (
        torch.autograd.grad(function(x)[index].square().sum(), x)[0]
        for function in (
            lambda x: group_norm_silu(x, **tensors, **options, impl=impl),
            lambda x: group_norm_silu_ref(x, **tensors, **options),
        )
    )
    assert_within(got, reference, truth, "dx", "input gradient")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_compiled_gradient_is_the_eager_one(impl):
    # The kernels need channels-last. The reference uses contiguous: compiled, its sums depend on the layout.
    layout = "channels_last" if impl == "triton" else "contiguous"
    tensors, options = call_of(CASES[0] | dict(shape="skip", dtype="fp32", layout=layout, modulated=True))
    if refused(impl, tensors, options):
        return

    def function(**arguments: Any) -> Tensor:
        return group_norm_silu(**arguments, impl=impl) * 2

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    dy = function(**tensors, **options)
    eager, through = (gradients(f, tensors, options, dy) for f in (function, compiled))
    assert all(torch.equal(eager[name], through[name]) and bool(eager[name].any()) for name in tensors)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("resample", [None, "up", "down"])
@pytest.mark.parametrize("skip", [False, True], ids=["one source", "two sources"])
def test_channels_last_stays(impl, resample, skip):
    x = torch.randn(2, 8, 6, 4).to(memory_format=torch.channels_last)
    channels = 16 if skip else 8
    tensors = {"x": x, "weight": torch.ones(channels), "bias": torch.zeros(channels)} | (
        {"x2": x} if skip else {}
    )
    options = dict(groups=4, resample=resample)
    if not refused(impl, tensors, options):
        y = group_norm_silu(**tensors, **options, impl=impl)
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_edges(impl):
    weight, bias = torch.ones(4), torch.arange(4.0)
    for shape in ((0, 4, 3, 3), (1, 4, 1, 1), (2, 4, 1, 1)):
        tensors, options = (
            {"x": torch.full(shape, 3.0), "weight": weight, "bias": bias},
            dict(groups=4, silu=False),
        )
        if refused(impl, tensors, options):
            continue
        # A group of equal values has variance 0, so only the bias remains.
        truth = bias.double().view(1, 4, 1, 1).expand(shape)
        y, reference = (group_norm_silu(**tensors, **options, impl=name) for name in (impl, "reference"))
        assert y.shape == shape
        if y.numel():
            assert_within(y, reference, truth, str(shape))
    x = torch.randn(1, 4, 3, 3)
    for where in ((0, 1, 2, 0), (0, 3, 0, 0)):
        poisoned = x.clone()
        poisoned[where] = float("nan")
        if refused(impl, {"x": poisoned, "weight": weight, "bias": bias}, dict(groups=2)):
            continue
        nan = group_norm_silu(poisoned, weight, bias, 2, impl=impl).isnan()
        group = where[1] // 2
        assert nan[:, 2 * group : 2 * group + 2].all() and int(nan.sum()) == 18, (
            "NaN must fill its own group only"
        )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_eps_is_added_to_the_variance(impl):
    x = torch.randn(1, 2, 5, 5)
    tensors, options = (
        {"x": x, "weight": torch.ones(2), "bias": torch.zeros(2)},
        dict(groups=1, silu=False, eps=3.0),
    )
    if not refused(impl, tensors, options):
        wide = moved(tensors, torch.float64)
        y, reference = (f(**tensors, **options) for f in (group_norm_silu, group_norm_silu_ref))
        assert_within(y, reference, formula(**wide, **options), "eps")
