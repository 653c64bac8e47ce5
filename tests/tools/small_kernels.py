"""`python -m tests.tools.small_kernels`: run every Triton and CUDA kernel on the small cases of its op.

It is made for compute-sanitizer, under which launches are slow. So only the kernels run on the device; inputs
are made and results compared on the CPU. `--device cpu` uses Triton's interpreter and the C++ ops. Kernels
use the blocks of a GPU, with sizes that leave tiles, chunks and groups partly filled.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch

if __name__ == "__main__" and "cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported

from admfast.errors import Unavailable
from admfast.ops import TABLES
from admfast.ops.cases import Case, OpCases, all_cases
from tests.kernels.norm_cases import module
from tests.kernels.values import drawing, judge, mapped, noises, results
from tests.ops.anywhere import Mover
from tests.ops.tolerance import HALF_AND_SINGLE

IMPLEMENTATIONS = {"cuda": ("triton", "cuda"), "cpu": ("triton", "cpp")}


def ran_by(cases: OpCases, impl: str, device: str) -> Iterator[str]:
    """Check every small case of an implementation. Yield the names of Triton's kernels, or of the calls."""
    launch = module("norm_launch")
    real, launched = launch.run, []

    def run(calls: list[Any], where: torch.device) -> None:
        launched.extend(call.kernel.__name__ for call in calls)
        real(calls, where)

    dtypes = list(HALF_AND_SINGLE.values()) if cases.dtype_of is not None else [torch.float32]
    if device == "cpu" and impl == "triton":
        dtypes.remove(torch.bfloat16)  # the interpreter truncates instead of rounding
    for case, dtype, limits in itertools.product(cases.small, dtypes, cases.launch_settings):
        with mock.patch.multiple(launch, INTERPRETED=False, run=run, **limits):
            try:
                judged(cases, impl, device, case, dtype)
            except Unavailable:
                continue  # the implementation doesn't support this dtype or layout
        if impl != "triton":
            launched.append(f"{cases.op} {case} {dtype}")
    yield from launched


def judged(cases: OpCases, impl: str, device: str, case: Case, dtype: torch.dtype) -> None:
    """Run one case on the device, and compare values and gradients with the reference on the CPU."""
    reference = functools.partial(cases.call, impl="reference")
    options = cases.arguments(drawing("cpu", seed=0), dtype, **case)
    tensors = {name: options.pop(name) for name in cases.differentiable if name in options}
    noise = noises(reference, tensors, options)
    there = (mapped(given, Mover(device)) for given in (tensors, options))
    got = results(functools.partial(cases.call, impl=impl), *there, noise)
    if impl == "triton":  # these kernels support channels-last only
        for name, value in got.items():
            assert value.dim() < 3 or value.movedim(1, -1).is_contiguous(), f"{name}: {value.stride()}"
    judge({name: value.cpu() for name, value in got.items()}, reference, tensors, options, noise)


def every(device: str) -> Iterator[tuple[OpCases, str]]:
    """Yield every op with each implementation by our own kernels that the device can run."""
    for cases in all_cases():
        for impl in IMPLEMENTATIONS[device]:
            table = TABLES.get(cases.op)
            if impl in cases.implementations and not (table and table.find(impl).reason_missing()):
                yield cases, impl


def main(argv: Sequence[str] | None = None) -> int:
    """Run all kernels and print their number. A wrong result raises AssertionError."""
    parser = argparse.ArgumentParser(prog="python -m tests.tools.small_kernels", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="default: %(default)s")
    device = parser.parse_args(argv).device
    ran = [name for cases, impl in every(device) for name in ran_by(cases, impl, device)]
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{len(ran)} launches of {len(set(ran))} kernels agree with the reference")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
