"""Count what a step launches and moves: torch's operations by a dispatch mode, our kernels at their launch.

A launch is a kernel of the device. torch's operations launch one each, but for those listed here; views and
allocations launch none. Bytes are those of every tensor that a kernel reads or writes, each once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ATEN = torch.ops.aten
# Operations of torch that launch another number of kernels than one. Flash attention's backward sums dO * O
# first and converts dQ last, efficient attention's sums first; cuDNN adds no bias in torch.
LAUNCHES = {
    ATEN._scaled_dot_product_flash_attention_backward.default: 3,
    ATEN._scaled_dot_product_efficient_attention_backward.default: 2,
    ATEN._scaled_dot_product_cudnn_attention_backward.default: 3,
}
ALLOCATIONS = {"empty", "new_empty", "empty_strided", "new_empty_strided", "empty_like"}
FREE = ALLOCATIONS | {"promote_types", "_unsafe_view"}
# The argument that kernels of ours read and write.
IN_PLACE = dict.fromkeys(("_conv_epilogue_fwd_kernel", "_conv_epilogue_sums_fwd_kernel"), "y_ptr")
KINDS = {
    **dict.fromkeys(("convolution", "convolution_backward"), "convolution"),
    **dict.fromkeys(("mm", "addmm", "addmm_", "bmm"), "product"),
    **dict.fromkeys(("cat", "clone", "copy_", "_to_copy"), "copy"),
    **dict.fromkeys(("add", "add_", "mul", "mul_"), "elementwise"),
    "sampler_step_": "update",
}


@dataclass(frozen=True)
class Like:
    """Dtype, shape and strides of a tensor, and the bytes that reading it once takes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, t: Tensor) -> Like:
        return cls(t.dtype, tuple(t.shape), tuple(t.stride()))

    @property
    def elements(self) -> int:
        """Return how many different elements there are: a dimension of stride 0 repeats its one."""
        count = 1
        for size, stride in zip(self.shape, self.strides, strict=True):
            count *= size if stride else min(size, 1)
        return count

    @property
    def nbytes(self) -> int:
        return self.elements * self.dtype.itemsize


@dataclass(frozen=True)
class Launch:
    """One operation: its kernels, and the tensors that they read and write."""

    name: str
    kind: str
    count: int
    read: tuple[Like, ...]
    written: tuple[Like, ...]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.read, *self.written))


@dataclass
class Counted:
    """The launches of a block, in order, and the tensors that went to the host."""

    launches: list[Launch] = field(default_factory=list)
    read_back: list[str] = field(default_factory=list)

    def count(self, *kinds: str) -> int:
        """Return the kernels of these kinds; of all without any."""
        return sum(found.count for found in self.of(*kinds))

    def nbytes(self, *kinds: str) -> int:
        """Return the bytes that kernels of these kinds move."""
        return sum(found.nbytes for found in self.of(*kinds))

    def of(self, *kinds: str) -> list[Launch]:
        return [found for found in self.launches if not kinds or found.kind in kinds]


class _Operations(TorchDispatchMode):
    """Note torch's operations that launch something on the device."""

    def __init__(self, counted: Counted):
        super().__init__()
        self.counted = counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        there = any(t.device.type == "cuda" for t in given)
        if name in ("_local_scalar_dense", "equal", "nonzero") or (
            there and any(t.device.type == "cpu" for t in made)
        ):
            self.counted.read_back.append(str(func))
        on_device = any(t.device.type == "cuda" for t in (*given, *made))
        if name in FREE or func.is_view or func.namespace == "prim" or not on_device:
            return out
        arguments = zip(args, func._schema.arguments, strict=False)
        changed = [a for a, told in arguments if told.is_write and isinstance(a, Tensor)]
        written = [*changed, *(t for t in made if not any(t is other for other in changed))]
        kind = KINDS.get(name, "attention" if "attention" in name else "other")
        read = tuple(map(Like.of, given))
        launch = Launch(name, kind, LAUNCHES.get(func, 1), read, tuple(map(Like.of, written)))
        self.counted.launches.append(launch)
        return out


@contextlib.contextmanager
def counting() -> Iterator[Counted]:
    """Count what is launched within the block, none of which runs: under FakeTensorMode."""
    from admfast._source_tree import import_kernels

    import_kernels()
    from admfast.kernels import norm_launch

    counted = Counted()

    def launched(calls: Any, device: torch.device) -> None:
        counted.launches.extend(map(_ours, calls))

    with mock.patch.object(norm_launch, "run", launched), _Operations(counted):
        yield counted


def _ours(call: Any) -> Launch:
    """Return a launch of a kernel of ours, which names its tensors; all count as read."""
    name = call.kernel.__name__
    tensors = {k: v for k, v in call.arguments.items() if isinstance(v, Tensor)}
    # Partial sums are no images, though they have as many dimensions.
    read = tuple(Like.of(v.flatten() if k == "partial_ptr" else v) for k, v in tensors.items())
    written = (Like.of(tensors[IN_PLACE[name]]),) if name in IN_PLACE else ()
    return Launch(name, "norm" if "group_norm" in name else "elementwise", 1, read, written)
