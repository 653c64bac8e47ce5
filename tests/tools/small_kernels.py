"""`python -m tests.tools.small_kernels`: every Triton and CUDA kernel once, on small odd shapes.

For compute-sanitizer, under which each launch takes long: only they run on the device, inputs are made and
results judged on the CPU. `--device cpu` takes Triton's interpreter and the C++ op. Kernels get the blocks
that a GPU gets, in sizes that leave tiles, chunks and groups unfilled.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch

if __name__ == "__main__" and "cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported

from admfast.ops import as_seeds, group_norm_silu, normal, normal_ref, pack, sampler_step
from tests.kernels.norm_cases import assert_channels_last, call_of, judge, module, noises, results
from tests.ops.cover import laid_out
from tests.ops.test_sampler_step_gpu import ROWS, check, inputs, on, placed, state_of
from tests.ops.tolerance import HALF_AND_SINGLE, assert_within, bits

PLAIN = dict(modulated=True, silu=True, resample=None, with_skip=False, weights="fp32", mean=0)
# Two trips and three chunks of positions; a group with channels of both sources; odd rows dropped and kept.
NORMS: tuple[dict[str, Any], ...] = (
    PLAIN | dict(shape=(2, 24, 0, 8, (17, 31)), dtype="fp16", mean=100),
    PLAIN | dict(shape=(1, 20, 10, 5, (5, 7)), dtype="fp32", resample="up", with_skip=True),
    PLAIN | dict(shape=(1, 20, 10, 5, (9, 7)), dtype="fp16", resample="down", with_skip=True),
    PLAIN | dict(shape=(1, 3, 0, 1, (37,)), dtype="fp32", silu=False, modulated=False),
)
# (shape, layout of the network's output, whether that has variance channels)
SAMPLERS = (
    ((2, 3, 4, 6), "contiguous", True),
    ((2, 3, 4, 6), "channels_last", True),
    ((2, 3, 4, 6), "channels_last", False),
    ((2, 1, 4, 10), "channels_last", True),
    ((2, 3, 5, 7), "sliced", True),
)


# (shape, bias, residual): blocks filled and unfilled, a bias read as a whole and in crumbs
EPILOGUES = (
    ((2, 16, 16, 8), True, True),
    ((1, 65, 7, 5), True, True),
    ((3, 6, 19, 23), True, False),
    ((1, 3, 2, 5, 3), False, True),
)


def epilogues(device: str) -> Iterator[str]:
    """Return what is added after a convolution; yields the name of the kernel."""
    epilogue = module("conv_epilogue")
    for (shape, has_bias, has_residual), dtype in itertools.product(EPILOGUES, HALF_AND_SINGLE.values()):
        if device == "cpu" and dtype == torch.bfloat16:
            continue  # the interpreter cuts it off where a GPU rounds
        y, residual = (laid_out(torch.randn(shape).to(dtype), "channels_last") for _ in range(2))
        bias = torch.randn(shape[1]).to(dtype)
        given = (bias if has_bias else None, residual if has_residual else None)
        there = (None if t is None else t.to(device) for t in given)
        got = epilogue.conv_epilogue_fwd(y.to(device, copy=True), *there).cpu()
        parts = [y, bias.view(-1, *(1,) * (y.dim() - 2)) if has_bias else None, given[1]]
        truth, reference = (sum(t.to(d) for t in parts if t is not None) for d in (torch.float64, dtype))
        assert_within(got, reference, truth, f"conv_epilogue {shape} {dtype}")
        yield "_conv_epilogue_fwd_kernel"


def norms(device: str) -> Iterator[str]:
    """Forward and backward of every case by both ways of launching; yields the names of the kernels."""
    launch = module("norm_launch")
    real, launched = launch.run, []

    def run(calls: list[Any], where: torch.device) -> None:
        launched.extend(call.kernel.__name__ for call in calls)
        real(calls, where)

    for case in NORMS:
        # One read; two passes, as if nothing fitted, with several tiles a program.
        for limits in ({}, {"SHARE": 0, "RESIDENT": 2}):
            tensors, options = call_of(case, "cpu")
            noise = noises(tensors, options)
            there = {name: t.to(device) for name, t in tensors.items()}
            with mock.patch.multiple(launch, INTERPRETED=False, run=run, **limits):
                got = results(lambda **k: group_norm_silu(**k, impl="triton"), there, options, noise)
            assert_channels_last(case, got)
            judge({name: value.cpu() for name, value in got.items()}, tensors, options, noise)
    yield from launched


def samplers(device: str) -> Iterator[str]:
    """Every layout and type of the update, and the noise by itself; yields what ran."""
    impl = "cuda" if device == "cuda" else "cpp"
    for (shape, layout, variance), dtype in itertools.product(SAMPLERS, HALF_AND_SINGLE.values()):
        given, rows = inputs(shape, dtype, layout), ROWS
        if not variance:
            given |= {name: laid_out(given[name][:, : shape[1]], layout) for name in ("out", "out2")}
            rows = [dataclasses.replace(row, l1=0) for row in ROWS]
        there = {name: placed(value, device=device) for name, value in given.items()}
        state = on(state_of(shape), device=device)
        sampler_step(state, table=pack(rows, device), row=1, impl=impl, **there)
        check(state, shape, given, rows)
        yield f"sampler_step {shape} {layout} {dtype} {variance}"
    seeds = as_seeds([0, 2**64 - 1])
    got = normal(seeds.to(device), (3, 5, 7), 2, 1, impl=impl).cpu()
    assert torch.equal(bits(got), bits(normal_ref(seeds, (3, 5, 7), 2, 1))), "noise has other bits"
    yield "normal"


def main(argv: Sequence[str] | None = None) -> int:
    """Run them; raises AssertionError where one is wrong, else says how many there were."""
    parser = argparse.ArgumentParser(prog="python -m tests.tools.small_kernels", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="default: %(default)s")
    device = parser.parse_args(argv).device
    ran = [*norms(device), *epilogues(device), *samplers(device)]
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{len(ran)} launches of {len(set(ran))} kernels agree with the reference")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
