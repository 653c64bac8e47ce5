"""Small calls of every op, with which `admfast info` finds out which implementation runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from admfast.ops import TABLES
from admfast.ops.cases import OpCases, all_cases

Example = tuple[str, str, Callable[[], Any]]
# The dtypes used on each kind of device.
DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float16, torch.bfloat16, torch.float32),
}


def examples(device: str) -> Iterator[Example]:
    """Yield (op, text that describes the call, call) for every op on `device`, in the dtypes used there."""
    for cases in all_cases():
        if cases.op not in TABLES:
            continue
        for dtype in DTYPES[device] if cases.dtype_of is not None else DTYPES[device][:1]:
            dtype_name = None if cases.dtype_of is None else str(dtype).removeprefix("torch.")
            for gradient in (False, True) if cases.differentiable else (False,):
                description = (device, dtype_name, cases.dtype_of, "with gradient" if gradient else None)
                yield (
                    cases.op,
                    " ".join(filter(None, description)),
                    partial(_run, cases, device, dtype, gradient),
                )


def _run(cases: OpCases, device: str, dtype: torch.dtype, gradient: bool) -> None:
    """Run an op's example; with `gradient`, every differentiable argument requires one."""
    with torch.set_grad_enabled(gradient):
        arguments = cases.arguments(partial(torch.zeros, device=device), dtype)
        for name in cases.differentiable:
            if gradient and name in arguments:
                arguments[name].requires_grad_(True)
        cases.call(**arguments)
