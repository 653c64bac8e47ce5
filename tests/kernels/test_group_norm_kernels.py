"""Tests of the kernels of `group_norm_silu` on both paths: values, gradients, errors.

Without a GPU the kernels are interpreted.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from admfast.errors import Unavailable
from admfast.ops import TABLES, group_norm_silu
from admfast.ops.norm.grad import RAW_NORMS, NormOptions
from tests.kernels.norm_cases import DEVICE, DTYPES, SHAPES, call_of, check, force, module, poison
from tests.ops.cover import all_pairs, case_id

pytest.importorskip("triton")
OPTIONS = dict(
    shape=list(SHAPES),
    dtype=list(DTYPES),
    mean=[0, 100],
    modulated=[False, True],
    silu=[False, True],
    resample=[None, "up", "down"],
    with_skip=[False, True],
    weights=["fp32", "same"],
    path=["one read", "two passes"],
    biased=[None, "channel", "image"],
    out=[None, torch.float32],
)
CASES = [
    case | dict(biased=None if case["with_skip"] else case["biased"]) for case in all_pairs(2, **OPTIONS)
]
SMALL = dict(modulated=True, silu=True, resample=None, with_skip=False, weights="fp32", mean=0, dtype="fp32")
# Real images for each path, and the widest. With 384 + 192 channels, one group of 18 straddles both sources.
ADM = {
    "64x64": (1, 192, 0, 32, (64, 64)),
    "16x16 of two sources": (2, 384, 192, 32, (16, 16)),
    "8x8": (2, 1024, 0, 32, (8, 8)),
    "8x8 of two sources": (1, 1024, 1024, 32, (8, 8)),
    "one group of 2048": (1, 2048, 0, 1, (24, 24)),
}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    poison(monkeypatch)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_values_and_gradients(case, monkeypatch):
    force(monkeypatch, case["path"])
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", OPTIONS["path"])
def test_values_and_gradients_of_the_whole_grid(shape, dtype, path, monkeypatch):
    force(monkeypatch, path)
    names = ["mean", "modulated", "silu", "resample", "with_skip", "weights"]
    for values in itertools.product(*(OPTIONS[name] for name in names)):
        check(dict(zip(names, values, strict=True)) | dict(shape=shape, dtype=dtype))


@pytest.mark.parametrize("path", ["chosen", "as a GPU"])
@pytest.mark.parametrize("resample", [None, "up", "down"])
@pytest.mark.parametrize("shape", ADM)
def test_shapes_of_the_networks(shape, resample, path, monkeypatch):
    if path != "chosen" and (shape == "64x64" or resample is not None):
        pytest.skip("the interpreter is slow with the blocks of a GPU: only small shapes without resampling")
    if path != "chosen":
        monkeypatch.setattr(module("norm_launch"), "INTERPRETED", False)
    modulated = resample is None
    skip = resample is not None
    check(
        SMALL | dict(shape=ADM[shape], dtype="fp16", modulated=modulated, resample=resample, with_skip=skip)
    )


@pytest.mark.parametrize("path", ["one read", "two passes"])
def test_frozen_parameters_change_nothing_in_dx(path, monkeypatch):
    force(monkeypatch, path)
    tensors, _ = call_of(SMALL | dict(shape="straddling"))
    arguments = [tensors.get(name) for name in ("x", "x2", "x_bias", "weight", "bias", "scale", "shift")]
    options = NormOptions(3, 1e-5, True, "up", True)
    y, skip, mean, rstd = RAW_NORMS["triton"].forward(*arguments, options)
    dy, dskip = torch.randn_like(y), torch.randn_like(skip)
    full, lean = (
        RAW_NORMS["triton"].backward(dy, dskip, *arguments, mean, rstd, options, sums)
        for sums in (True, False)
    )
    assert full[2].shape == full[3].shape == (2, 12) and lean[2].numel() == lean[3].numel() == 0
    assert torch.equal(lean[0], full[0]) and torch.equal(lean[1], full[1])
    again = RAW_NORMS["triton"].backward(dy, dskip, *arguments, mean, rstd, options, True)
    assert all(torch.equal(a, b) for a, b in zip(full, again, strict=True)), "a second call gives other bits"


@pytest.mark.parametrize("path", ["one read", "two passes"])
@pytest.mark.parametrize("resample", [None, "up", "down"])
def test_a_gradient_of_any_layout_is_taken(resample, path, monkeypatch):
    force(monkeypatch, path)
    tensors, options = call_of(SMALL | dict(shape="odd", resample=resample))
    x = tensors.pop("x").requires_grad_(True)
    y = group_norm_silu(x, **tensors, **options, impl="triton")
    dy = torch.randn(y.shape, device=DEVICE)
    dense, expected = (torch.autograd.grad(y, x, d, retain_graph=True)[0] for d in (dy, dy.to(y)))
    assert torch.equal(dense, expected)
    (of_sum,) = torch.autograd.grad(y.sum(), x, retain_graph=True)  # dy is one expanded number
    assert torch.equal(of_sum, torch.autograd.grad(y, x, torch.ones_like(y))[0])


@pytest.mark.parametrize("path", ["one read", "two passes"])
def test_a_nan_stays_in_its_group(path, monkeypatch):
    force(monkeypatch, path)
    for channel in (0, 6, 23):
        tensors, options = call_of(SMALL | dict(shape="odd"))
        x = tensors.pop("x")
        x[0, channel, 3, 2] = float("nan")
        y = group_norm_silu(x, **tensors, **options, impl="triton")
        group = channel // 3 * 3
        assert y[:, group : group + 3].isnan().all() and int(y.isnan().sum()) == 3 * 35


@pytest.mark.parametrize("path", ["one read", "two passes"])
def test_a_first_tile_unlike_the_rest_costs_no_accuracy(path, monkeypatch):
    # Sums are taken about the first tile's mean. Here that is 1000 deviations from the rest, and the terms
    # that cancel are larger by the number of tiles of a program, 36.
    force(monkeypatch, path)
    torch.manual_seed(0)
    x = torch.randn(1, 8, 12, 12, device=DEVICE)
    x[:, :, 0, :4] -= 1000
    x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    one, zero = torch.ones(8, device=DEVICE), torch.zeros(8, device=DEVICE)
    y = group_norm_silu(x, one, zero, 4, silu=False, impl="triton").double()
    truth = group_norm_silu(x.double(), one.double(), zero.double(), 4, silu=False, impl="reference")
    assert float((y - truth).abs().max()) <= 36 * torch.finfo(torch.float32).eps * float(truth.abs().max())


@pytest.mark.parametrize("mean", [1000, 100_000])
@pytest.mark.parametrize("path", ["one read", "two passes"])
def test_what_float32_leaves_out_of_a_mean_is_not_lost(path, mean, monkeypatch):
    # At mean 1000 and deviation 1, rounding the group's mean to float32 would shift every result by up to
    # 3e-5. At mean 100000 the square of what is lost, up to 1.5e-5 of the variance, counts too. The kernel
    # keeps the rest of the mean too, `low`. x - mean is exact here (Sterbenz). The limit counts six roundings
    # of half a unit of the result (low, rstd, a, low * a, the product, the sum), and a quarter of a unit for
    # each of the 40 sums in a row (36 tiles, then rows and channels) of the variance, whose relative error
    # rstd halves.
    force(monkeypatch, path)
    torch.manual_seed(0)
    x = (torch.randn(2, 12, 12, 8, device=DEVICE) + mean).movedim(-1, 1)
    one, zero = torch.ones(8, device=DEVICE), torch.zeros(8, device=DEVICE)
    y = group_norm_silu(x, one, zero, 2, silu=False, impl="triton").double()
    truth = group_norm_silu(x.double(), one.double(), zero.double(), 2, silu=False, impl="reference")
    unit = torch.finfo(torch.float32).eps * float(truth.abs().max())
    assert float((y - truth).abs().max()) <= (6 / 2 + 40 / 4) * unit


def test_what_is_refused_and_why(monkeypatch):
    tensors, options = call_of(SMALL | dict(shape="straddling"))
    wrong = {
        "x is not dense channels-last": dict(x=tensors["x"].contiguous()),
        "x2 is not dense channels-last": dict(x2=tensors["x2"].contiguous()),
        "x is torch.float64": dict(x=tensors["x"].double(), x2=tensors["x2"].double()),
    }
    for reason, changes in wrong.items():
        with pytest.raises(Unavailable, match=f"impl='triton'.*{reason}"):
            group_norm_silu(**(tensors | changes), **options, impl="triton")
    with pytest.raises(ValueError, match="channels-last"):
        module("group_norm").group_norm_silu_fwd(
            tensors["x"].contiguous(), None, *[None] * 5, 1, 1e-5, True, None, False
        )


@pytest.mark.skipif(DEVICE == "cuda", reason="with a GPU nothing is interpreted")
def test_the_interpreter_runs_only_where_it_is_named(monkeypatch):
    tensors, options = call_of(SMALL | dict(shape="odd"))
    del options["with_skip"]
    call = {name: tensors.get(name) for name in ("scale", "shift", "x2")} | options
    groups = call.pop("groups")
    arguments = (*(tensors[name] for name in ("x", "weight", "bias")), groups, 1e-5)
    table = TABLES["group_norm_silu"]
    assert table.names()[0] == "triton" and table.choose(None, *arguments, **call).name != "triton"
    assert table.choose("triton", *arguments, **call).name == "triton"
    monkeypatch.setenv("ADMFAST_IMPL", "group_norm_silu=triton")
    assert table.choose(None, *arguments, **call).name == "triton"
