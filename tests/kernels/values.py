"""Values and gradients of a call of any op, and their comparison with the reference."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from admfast.ops import PackedTable
from tests.ops.tolerance import assert_within


def kernel_names() -> set[str]:
    """Return the names of all kernels in `kernels/`."""
    files = (Path(__file__).resolve().parents[2] / "kernels").glob("*.py")
    return {name for file in files for name in re.findall(r"^def (_\w+_kernel)\(", file.read_text(), re.M)}


def mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor in arguments. A PackedTable keeps its copy on the host."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {name: mapped(one, function) for name, one in value.items()}
    if isinstance(value, PackedTable):
        return dataclasses.replace(value, device=function(value.device))
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(value, **mapped(vars(value), function))
    return value


def wide(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with floating-point tensors in float64."""
    return mapped(arguments, lambda t: t.double() if t.is_floating_point() else t)


def drawing(device: str | torch.device, seed: int) -> Callable[..., Tensor]:
    """Return a function that draws standard normal float32 values of a shape on `device`."""
    kind = torch.device(device).type
    generator = None if kind == "meta" else torch.Generator(kind).manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator, device=device)


def together(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def noises(reference: Any, tensors: dict[str, Tensor], options: dict[str, Any]) -> list[Tensor]:
    """Return output gradients for `results`: noise with the dtype and device of the first tensor."""
    if not tensors:
        return []
    meta = mapped(tensors | options, lambda t: t.detach().to("meta"))
    first = next(iter(tensors.values()))
    randn = drawing(first.device, seed=1)
    return [randn(*y.shape).to(first.dtype) for y in together(reference(**meta))]


def results(
    function: Any, tensors: dict[str, Tensor], options: dict[str, Any], noise: list[Tensor]
) -> dict[str, Tensor]:
    """Return every output, and the gradient in each of `tensors` of the outputs' product with `noise`.

    The options are copied first, because a call may write to them.
    """
    leaves = {name: t.detach().requires_grad_(True) for name, t in tensors.items()}
    outputs = together(function(**leaves, **copy.deepcopy(options)))
    found = {}
    if leaves:
        given = [z.to(y) for z, y in zip(noise, outputs, strict=True)]
        grads = torch.autograd.grad(outputs, list(leaves.values()), given)
        found = {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}
    return found | {f"output {i}": y.detach() for i, y in enumerate(outputs)}


def judge(
    got: dict[str, Tensor],
    reference: Any,
    tensors: dict[str, Tensor],
    options: dict[str, Any],
    noise: list[Tensor],
) -> None:
    """Compare `got`, computed with output gradients `noise`, with the reference, on the device of `tensors`.

    A tensor with fewer dimensions than the largest is a parameter, whose gradient is a sum.
    """
    plain = results(reference, tensors, options, noise)
    truth = results(reference, wide(tensors), wide(options), noise)
    dims = max((t.dim() for t in tensors.values()), default=0)
    elements = sum(t.numel() for t in tensors.values() if t.dim() == dims)
    for name, value in got.items():
        kind, terms = "output", 1
        if name.startswith("d"):
            of = tensors[name[1:]]
            kind = "input gradient" if of.dim() == dims else "parameter gradient"
            terms = 1 if of.dim() == dims else elements // of.numel()
        assert_within(value, plain[name], truth[name].double(), name, kind, terms)
