"""The sampler's ops, called with CPU tensors and run on the device that an implementation needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from admfast import ops
from admfast.ops import TABLES, PackedTable, SamplerState

ON_A_GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
)


def runnable(op: str) -> list[Any]:
    """Return the implementations of an op for parametrize; `cuda` has the mark `gpu`."""
    return [ON_A_GPU if name == "cuda" else name for name in TABLES[op].names()]


class Mover:
    """A function that copies tensors to a device with their strides, offsets and shared storage."""

    def __init__(self, device: str):
        self.device, self.storages = device, {}

    def __call__(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.device.type != "cpu" or self.device == "cpu":
            return value
        value = value.detach()
        key = value.untyped_storage().data_ptr()
        whole = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage())
        if key not in self.storages or not value.numel():
            self.storages[key] = whole.to(self.device)
        storage = self.storages[key].untyped_storage()
        moved = torch.empty(0, dtype=value.dtype, device=self.device)
        return moved.set_(storage, value.storage_offset(), value.shape, value.stride())


def sampler_step(
    state: SamplerState,
    out: Tensor,
    table: PackedTable,
    row: int | Tensor,
    *,
    impl: str | None = None,
    **options: Any,
) -> None:
    """Run `ops.sampler_step`; for `cuda` on the GPU, with the results copied back into the CPU's buffers."""
    if impl != "cuda":
        return ops.sampler_step(state, out, table, row, impl=impl, **options)
    move = Mover("cuda")
    buffers = (state.x, state.x0, state.saved, state.history)
    there = SamplerState(*(move(buffer) for buffer in buffers))
    given = {name: move(value) for name, value in options.items()}
    ops.sampler_step(
        there, move(out), PackedTable(table.host, move(table.device)), move(row), impl=impl, **given
    )
    for ours, theirs in zip(buffers, (there.x, there.x0, there.saved, there.history), strict=True):
        if ours is not None:
            ours.detach().copy_(theirs)


def normal(seeds: Tensor, shape: tuple[int, ...], row: int, stream: int, impl: str | None = None) -> Tensor:
    """Run `ops.normal`; for `cuda` on the GPU, with the result copied to the CPU."""
    return ops.normal(Mover("cuda")(seeds) if impl == "cuda" else seeds, shape, row, stream, impl=impl).cpu()
