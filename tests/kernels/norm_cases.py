"""Calls of `group_norm_silu` for the kernels' tests, their launches, and how a result is judged."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from admfast._source_tree import kernels
from admfast.ops import group_norm_silu, group_norm_silu_ref
from tests.ops.cover import laid_out
from tests.ops.tolerance import assert_within, unmodified

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
if torch.cuda.is_available():
    DTYPES["bf16"] = (
        torch.bfloat16
    )  # the interpreter cuts bfloat16 off where a GPU rounds: judged there alone
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# name: (batch, channels of x, channels of x2, groups, spatial)
SHAPES: dict[str, tuple[int, int, int, int, tuple[int, ...]]] = {
    "odd": (1, 24, 0, 8, (5, 7)),
    "one group": (2, 6, 0, 1, (4, 5)),
    "a group a channel": (3, 6, 0, 6, (3, 4)),
    "straddling": (2, 5, 7, 3, (3, 6)),  # 4 channels a group: one holds the last of x and 3 of x2
    "wide straddling": (1, 24, 12, 2, (6, 6)),
    "1d": (2, 12, 0, 4, (33,)),
    "1d straddling": (1, 4, 6, 2, (6,)),
    "3d": (1, 8, 0, 2, (3, 5, 4)),
    "3d odd": (2, 3, 5, 4, (2, 7, 3)),
    "one position": (2, 8, 0, 2, (2, 2)),
}


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
    """The tensors of a case, drawn on `device` ("meta" for sizes only), and its other arguments."""
    shape = case["shape"]
    n, c1, c2, groups, spatial = SHAPES[shape] if isinstance(shape, str) else shape
    dtype = DTYPES[case["dtype"]] if isinstance(case["dtype"], str) else case["dtype"]
    randn = drawing(device, seed=0)

    def source(channels: int, deviation: float) -> Tensor:
        values = deviation * randn(n, channels, *spatial) + case["mean"]
        return laid_out(values.to(dtype), "channels_last")

    tensors = {"x": source(c1, 1)}
    if c2:
        tensors["x2"] = source(c2, 2)
    weights = torch.float32 if case["weights"] == "fp32" else dtype
    weight, bias = randn(2, c1 + c2)
    tensors |= {"weight": (1 + weight).to(weights), "bias": bias.to(weights)}
    if case["modulated"]:
        scale, shift = randn(n, 2 * (c1 + c2)).to(dtype).chunk(2, dim=1)
        tensors |= {"scale": scale, "shift": shift}
    options = dict(groups=groups, silu=case["silu"], resample=case["resample"], with_skip=case["with_skip"])
    return tensors, options


def drawing(device: str | torch.device, seed: int) -> Callable[..., Tensor]:
    """A function that draws standard normal float32 values of a shape on `device`."""
    kind = torch.device(device).type
    generator = None if kind == "meta" else torch.Generator(kind).manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator, device=device)


def wide(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() for name, t in tensors.items()}


def noises(tensors: dict[str, Tensor], options: dict[str, Any]) -> list[Tensor]:
    """The gradients that `results` gives the outputs: noise in the dtype of x, drawn where x is."""
    meta = {name: t.detach().to("meta") for name, t in tensors.items()}
    outputs = group_norm_silu_ref(**meta, **options)
    randn, x = drawing(tensors["x"].device, seed=1), tensors["x"]
    return [randn(*y.shape).to(x.dtype) for y in (outputs if options["with_skip"] else (outputs,))]


def results(
    function: Any, tensors: dict[str, Tensor], options: dict[str, Any], noise: list[Tensor]
) -> dict[str, Tensor]:
    """Every output, and the gradient in every tensor of the outputs' product with `noise`."""
    leaves = {name: t.detach().requires_grad_(True) for name, t in tensors.items()}
    outputs = function(**leaves, **options)
    outputs = outputs if options["with_skip"] else (outputs,)
    given = [z.to(y) for z, y in zip(noise, outputs, strict=True)]
    grads = torch.autograd.grad(outputs, list(leaves.values()), given)
    found = {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}
    return found | {name: y.detach() for name, y in zip(("y", "skip"), outputs, strict=False)}


def check(case: dict[str, Any], impl: str = "triton") -> None:
    """Assert that values and gradients of a case are within the house's tolerance."""
    tensors, options = call_of(case)
    noise = noises(tensors, options)
    with unmodified(**tensors):
        got = results(lambda **k: group_norm_silu(**k, impl=impl), tensors, options, noise)
    assert_channels_last(case, got)
    judge(got, tensors, options, noise)


def check_ends(case: dict[str, Any], impl: str = "triton") -> None:
    """`check` for batches that are too large for a reference: the first and the last image are compared.

    What is summed over the images (dweight, dbias) isn't.
    """
    tensors, options = call_of(case)
    noise = noises(tensors, options)
    with unmodified(**tensors):
        got = results(lambda **k: group_norm_silu(**k, impl=impl), tensors, options, noise)
    assert_channels_last(case, got)
    ends = [0, len(tensors["x"]) - 1]
    some = {name: t if name in ("weight", "bias") else t[ends] for name, t in tensors.items()}
    mine = {name: value[ends] for name, value in got.items() if name not in ("dweight", "dbias")}
    judge(mine, some, options, [z[ends] for z in noise])


def assert_channels_last(case: dict[str, Any], got: dict[str, Tensor]) -> None:
    """Without resampling the skip is a view or a plain concatenation, whose gradient torch adds."""
    for name, value in got.items():
        if value.dim() > 2 and (case["resample"] or not case["with_skip"]):
            assert value.movedim(1, -1).is_contiguous(), f"{name}: {value.stride()}"


def judge(
    got: dict[str, Tensor],
    tensors: dict[str, Tensor],
    options: dict[str, Any],
    noise: list[Tensor],
) -> None:
    """Compare `got`, of gradients `noise`, with the reference, on the device of `tensors`."""
    reference = results(group_norm_silu_ref, tensors, options, noise)
    truth = results(group_norm_silu_ref, wide(tensors), options, noise)
    positions = tensors["x"][0, 0].numel()
    lengths = dict(dscale=positions, dshift=positions)
    lengths |= dict(dweight=len(tensors["x"]) * positions, dbias=len(tensors["x"]) * positions)
    for name, value in got.items():
        kind = "parameter gradient" if name in lengths else "input gradient" if name[0] == "d" else "output"
        assert_within(value, reference[name], truth[name], name, kind, lengths.get(name, 1))
