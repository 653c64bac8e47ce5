"""Calls of `group_norm_silu` for the tests of its kernels, and the checks of their results."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from admfast._source_tree import import_kernels
from admfast.ops import group_norm_silu, group_norm_silu_ref
from admfast.ops.cases import all_cases
from admfast.ops.norm.cases import SHAPES
from tests.kernels.values import drawing, judge, noises, results
from tests.ops.tolerance import unmodified

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
if torch.cuda.is_available():
    DTYPES["bf16"] = (
        torch.bfloat16
    )  # only on a GPU: the interpreter truncates to bfloat16 instead of rounding
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = ("n", "c1", "c2", "groups", "spatial")
(CALLS,) = (cases for cases in all_cases() if cases.op == "group_norm_silu")


def module(name: str) -> Any:
    """Import a module of the kernels' package, which importing admfast doesn't load."""
    import_kernels()
    return importlib.import_module(f"admfast.kernels.{name}")


def force(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """Use `path` for every shape, with blocks so small that every loop has several iterations."""
    launch = module("norm_launch")

    def one(shape: Any, backward: bool) -> Any:
        groups = 1 if shape.groups < 3 else 2  # with an odd number of groups the last program has fewer
        width = groups * shape.depth
        align = min(width & -width, 8)
        return launch.OneRead(groups, 4, launch.next_power_of_2(width), unroll=2, warps=1, align=align)

    def two(shape: Any, backward: bool) -> Any:
        return launch.TwoPass(4, 8, unroll=2, chunk=16, warps=1, apply_p=8, apply_warps=1)

    # Gives each program of the elementwise pass several tiles.
    monkeypatch.setattr(launch, "apply_slots", lambda *_: 4)
    if path != "chosen":
        monkeypatch.setattr(launch, "choose", {"one read": one, "two passes": two}[path])


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch.empty fill its tensors with NaN, which reveals elements that no kernel writes."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        t = empty(*args, **kwargs)
        return t.fill_(float("nan")) if t.is_floating_point() and not t.is_meta else t

    monkeypatch.setattr(torch, "empty", poisoned)


def call_of(case: dict[str, Any], device: str = DEVICE) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a case, drawn on `device` ("meta" for sizes only), and its other arguments.

    The case's shape is a name in `SHAPES`, or (batch, channels of x, channels of x2, groups, spatial).
    """
    case = dict(case)
    shape, dtype, weights = (case.pop(name) for name in ("shape", "dtype", "weights"))
    sizes = SHAPES[shape] if isinstance(shape, str) else dict(zip(SIZES, shape, strict=True))
    dtype = DTYPES[dtype] if isinstance(dtype, str) else dtype
    case = {name: value for name, value in case.items() if name != "path"} | sizes
    made = CALLS.arguments(
        drawing(device, seed=0), dtype, **case, weights=torch.float32 if weights == "fp32" else None
    )
    tensors = {name: made.pop(name) for name in CALLS.differentiable if name in made}
    return tensors, made


def check(case: dict[str, Any], impl: str = "triton") -> None:
    """Assert that values and gradients of a case are within the tolerance of `tests/ops/tolerance.py`."""
    tensors, options = call_of(case)
    noise = noises(group_norm_silu_ref, tensors, options)
    with unmodified(**tensors):
        got = results(lambda **k: group_norm_silu(**k, impl=impl), tensors, options, noise)
    assert_channels_last(case, got)
    judge(got, group_norm_silu_ref, tensors, options, noise)


def check_ends(case: dict[str, Any], impl: str = "triton") -> None:
    """Check the first and the last image of a batch that is too large for a reference.

    dweight and dbias, which are sums over the images, are not compared.
    """
    tensors, options = call_of(case)
    noise = noises(group_norm_silu_ref, tensors, options)
    with unmodified(**tensors):
        got = results(lambda **k: group_norm_silu(**k, impl=impl), tensors, options, noise)
    assert_channels_last(case, got)
    ends = [0, len(tensors["x"]) - 1]
    some = {name: t if name in ("weight", "bias") else t[ends] for name, t in tensors.items()}
    mine = {name: value[ends] for name, value in got.items() if name not in ("dweight", "dbias")}
    judge(mine, group_norm_silu_ref, some, options, [z[ends] for z in noise])


def assert_channels_last(case: dict[str, Any], got: dict[str, Tensor]) -> None:
    """Assert that values and gradients of images are channels-last.

    Cases with a skip but without resampling are left out: the skip is a view or a concatenation there, and
    torch adds its gradient.
    """
    for name, value in got.items():
        if value.dim() > 2 and (case["resample"] or not case["with_skip"]):
            assert value.movedim(1, -1).is_contiguous(), f"{name}: {value.stride()}"
