"""The sampler's ops on whatever device an implementation needs, called with tensors of the CPU."""

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
    """The implementations of an op, for parametrize; those that need a device carry its mark."""
    return [ON_A_GPU if name == "cuda" else name for name in TABLES[op].names()]


class Mover:
    """Copies tensors to a device as they lie in memory: strides, offsets and shared storage are kept."""

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
    """`ops.sampler_step`; for `cuda` on a device, and back into the CPU's buffers."""
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
    """`ops.normal`; for `cuda` on a device, the result back on the CPU."""
    return ops.normal(Mover("cuda")(seeds) if impl == "cuda" else seeds, shape, row, stream, impl=impl).cpu()
