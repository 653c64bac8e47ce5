"""Compute parts of a network again in the backward pass instead of keeping what they give."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from admfast.ops.transforms import in_transform


def maybe_checkpoint(block: Any, *args: Any) -> Tensor:
    """Run `block._forward`, again in the backward pass where its `use_checkpoint` says so.

    The non-reentrant form follows the graph, not the arguments, so that frozen parameters, double backward
    and inputs that need no gradient all work. `torch.func` can't recompute: under it everything is stored.
    Raises RuntimeError in the backward pass where the block's parameters were replaced since.
    """
    if not block.use_checkpoint or not torch.is_grad_enabled() or in_transform():
        return block._forward(*args)
    if torch.compiler.is_compiling():
        return checkpoint(block._forward, *args, use_reentrant=False)
    places = [_place(parameter) for parameter in block.parameters()]

    def forward(*given: Any) -> Tensor:
        if [_place(parameter) for parameter in block.parameters()] != places:
            raise RuntimeError(
                "checkpointing: the parameters that the forward pass used were replaced before the backward "
                "pass (torch.func.functional_call does so); use checkpointing 'none' or 'norms'"
            )
        return block._forward(*given)

    return checkpoint(forward, *args, use_reentrant=False)


def made_again(made: Tensor, again: Callable[[], Tensor]) -> contextlib.AbstractContextManager[Any]:
    """Let what runs within the block keep no `made` for its backward pass, which calls `again` for it.

    again: makes the same bits. Under torch.func and torch.compile `made` is kept.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or in_transform():
        return contextlib.nullcontext()
    own = _place(made)  # not the tensor, which the graph would hold through this function

    def pack(kept: Tensor) -> Tensor | None:
        return None if _place(kept) == own else kept

    def unpack(kept: Tensor | None) -> Tensor:
        if kept is not None:
            return kept
        with torch.no_grad():
            return again()

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _place(t: Tensor) -> tuple[Any, ...]:
    """Return what tells views of other elements apart, for tensors without memory too."""
    return t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride()
