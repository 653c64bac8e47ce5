"""Calls of `group_norm_silu` for the kernels' tests, their launches, and how a result is judged."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from admfast._source_tree import kernels
from admfast.ops import group_norm_silu, group_norm_silu_ref
from admfast.ops.cases import all_cases
from admfast.ops.norm.cases import SHAPES
from tests.kernels.values import drawing, judge, noises, results
from tests.ops.tolerance import unmodified

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
if torch.cuda.is_available():
    DTYPES["bf16"] = (
        torch.bfloat16
    )  # the interpreter cuts bfloat16 off where a GPU rounds: judged there alone
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = ("n", "c1", "c2", "groups", "spatial")
(CALLS,) = (cases for cases in all_cases() if cases.op == "group_norm_silu")


def module(name: str) -> Any:
    """A module of the kernels' package, which importing admfast doesn't load."""
    kernels()
    return importlib.import_module(f"admfast.kernels.{name}")


def force(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """Launch by `path` whatever the shape, with blocks so small that every loop has several trips."""
    launch = module("norm_launch")

    def one(shape: Any, backward: bool) -> Any:
        groups = 1 if shape.groups < 3 else 2  # a last program of fewer groups where the number is odd
        width = groups * shape.depth
        align = min(width & -width, 8)
        return launch.OneRead(groups, 4, launch.pow2(width), unroll=2, warps=1, align=align)

    def two(shape: Any, backward: bool) -> Any:
        return launch.TwoPass(4, 8, unroll=2, chunk=16, warps=1, apply_p=8, apply_warps=1)

    monkeypatch.setattr(launch, "RESIDENT", 4)  # several tiles a program of the elementwise pass
    if path != "chosen":
        monkeypatch.setattr(launch, "choose", {"one read": one, "two passes": two}[path])


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty gives with NaN: an element that no kernel writes is then seen."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        t = empty(*args, **kwargs)
        return t.fill_(float("nan")) if t.is_floating_point() and not t.is_meta else t

    monkeypatch.setattr(torch, "empty", poisoned)


def call_of(case: dict[str, Any], device: str = DEVICE) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a case, drawn on `device` ("meta" for sizes only), and its other arguments.

    shape: a name of the room's SHAPES, or (batch, channels of x, channels of x2, groups, spatial).
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
    """Assert that values and gradients of a case are within the house's tolerance."""
    tensors, options = call_of(case)
    noise = noises(group_norm_silu_ref, tensors, options)
    with unmodified(**tensors):
        got = results(lambda **k: group_norm_silu(**k, impl=impl), tensors, options, noise)
    assert_channels_last(case, got)
    judge(got, group_norm_silu_ref, tensors, options, noise)


def check_ends(case: dict[str, Any], impl: str = "triton") -> None:
    """`check` for batches that are too large for a reference: the first and the last image are compared.

    What is summed over the images (dweight, dbias) isn't.
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
    """Without resampling the skip is a view or a plain concatenation, whose gradient torch adds."""
    for name, value in got.items():
        if value.dim() > 2 and (case["resample"] or not case["with_skip"]):
            assert value.movedim(1, -1).is_contiguous(), f"{name}: {value.stride()}"
