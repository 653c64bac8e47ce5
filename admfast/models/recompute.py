"""Recompute parts of a network in the backward pass instead of storing their results."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from admfast.ops.transforms import in_transform


def maybe_checkpoint(block: Any, *args: Any) -> Tensor:
    """Run `block._forward`; if `block.use_checkpoint`, recompute it in the backward pass.

    This uses torch's non-reentrant checkpointing, which follows the graph, not the arguments. So frozen
    parameters, double backward and inputs that need no gradient all work. `torch.func` can't recompute: under
    it everything is stored. The backward pass raises RuntimeError if the block's parameters were replaced
    after the forward pass.
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
    """Recompute `made` by `again()` in the backward pass of code in the context, instead of storing it.

    again: returns the same values, bit for bit. Under torch.func and torch.compile, `made` is stored.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or in_transform():
        return contextlib.nullcontext()
    own = _place(made)  # not the tensor: the graph would keep it alive through `pack`

    def pack(kept: Tensor) -> Tensor | None:
        return None if _place(kept) == own else kept

    def unpack(kept: Tensor | None) -> Tensor:
        if kept is not None:
            return kept
        with torch.no_grad():
            return again()

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _place(t: Tensor) -> tuple[Any, ...]:
    """Return a key of the elements that a tensor views; tensors without memory have keys too."""
    return t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride()
