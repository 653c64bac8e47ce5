"""`python -m tests.kernels.norm_gpu_cases`: the GPU test cases of `group_norm_silu`, and their cost.

Triton takes a third of a second to compile each distinct kernel, so the cases cover all pairs of options,
not all combinations. The program plans the cases on the meta device and prints one line of JSON: how many
distinct kernels they compile and how many numbers they draw.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from admfast.ops import group_norm_silu_ref
from tests.kernels import norm_cases, values
from tests.ops.cover import all_pairs
from tests.ops.tolerance import HALF_AND_SINGLE

# (channels of x, channels of x2, spatial). They cover every path of the launch table, and groups that
# straddle x and x2.
REAL: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "192 64x64": (192, 0, (64, 64)),
    "384+192 64x64": (384, 192, (64, 64)),
    "256 128x128": (256, 0, (128, 128)),
    "512 64x64": (512, 0, (64, 64)),
    "576+384 32x32": (576, 384, (32, 32)),
    "512 32x32": (512, 0, (32, 32)),
    "768+576 16x16": (768, 576, (16, 16)),
    "1024+1024 8x8": (1024, 1024, (8, 8)),
    "768 64": (768, 0, (64,)),
}
ODD: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "34+30 33x17": (34, 30, (33, 17)),
    "96 7x9x5": (96, 0, (7, 9, 5)),
}
LARGE = {"256 256x256": (256, 0, (256, 256))}
SHAPES = REAL | ODD | LARGE
PLAIN = dict(modulated=False, silu=True, resample=None, with_skip=False, weights="same", mean=0)
MODES: dict[str, dict[str, Any]] = {
    "modulated": PLAIN | dict(modulated=True, weights="fp32"),
    "no silu, mean 100": PLAIN | dict(silu=False, mean=100),
    "up": PLAIN | dict(resample="up", with_skip=True),
    "down": PLAIN | dict(resample="down", with_skip=True, mean=100),
}
PATHS = ("one read", "two passes")
PAIRS = all_pairs(shape=list(REAL | ODD), mode=list(MODES), dtype=list(HALF_AND_SINGLE), path=list(PATHS))
# Real batches, in the engine's dtype and with the launches that admfast chooses.
BATCHES = [
    dict(shape=name, mode="modulated", dtype="bf16", batch=batch)
    for name, (c1, c2, spatial) in (REAL | LARGE).items()
    for batch in (1, 32 if (c1 + c2) * math.prod(spatial) <= 1 << 20 else 8 if name in REAL else 4)
]


def shaped(shape: tuple[int, int, tuple[int, ...]], batch: int, groups: int = 32) -> tuple[Any, ...]:
    """Return a shape in the form that `norm_cases.call_of` takes."""
    c1, c2, spatial = shape
    return (batch, c1, c2, groups, spatial)


def case_of(row: dict[str, Any]) -> dict[str, Any]:
    """Return the case of `norm_cases` for a row of PAIRS or BATCHES."""
    shape = shaped(SHAPES[row["shape"]], row.get("batch", 2))
    return MODES[row["mode"]] | dict(shape=shape, dtype=HALF_AND_SINGLE[row["dtype"]])


@contextlib.contextmanager
def forced(path: str | None) -> Iterator[None]:
    """Use `path` for every shape, with the blocks of a GPU. None keeps the usual choice."""
    launch = norm_cases.module("norm_launch")
    # "one read": no program's data is too large, and no row of it too narrow. "two passes": none fits.
    limits = {
        "one read": {"MAX_REREAD_BYTES": 1 << 30, "SECTOR_BYTES": 0},
        "two passes": {"MAX_REREAD_BYTES": 0},
    }
    with mock.patch.multiple(launch, **limits[path]) if path else contextlib.nullcontext():
        yield


def main() -> None:
    """Plan every case and print their cost."""
    from tests.kernels.compile_kernels import launches, source

    kernels, drawn = set(), 0
    drawing = norm_cases.drawing

    def counting(device: str | torch.device, seed: int) -> Any:
        draw = drawing(device, seed)

        def count(*shape: int) -> Tensor:
            nonlocal drawn
            drawn += math.prod(shape)
            return draw(*shape)

        return count

    with (
        mock.patch.object(norm_cases, "drawing", counting),
        mock.patch.object(values, "drawing", counting),
    ):
        for row in PAIRS + BATCHES:
            tensors, options = norm_cases.call_of(case_of(row), "meta")
            values.noises(group_norm_silu_ref, tensors, options)
            with forced(row.get("path")):
                calls = launches(norm_cases.CALLS, tensors | options)
            for call in calls:
                dtypes = tuple(v.dtype for v in call.arguments.values() if isinstance(v, Tensor))
                kernels.add((source(call)[1], dtypes))
    print(json.dumps({"cases": len(PAIRS + BATCHES), "kernels": len(kernels), "drawn": drawn}))


if __name__ == "__main__":
    main()
