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
    view_keys = [_view_key(parameter) for parameter in block.parameters()]

    def forward(*inputs: Any) -> Tensor:
        if [_view_key(parameter) for parameter in block.parameters()] != view_keys:
            raise RuntimeError(
                "checkpointing: the parameters that the forward pass used were replaced before the backward "
                "pass (torch.func.functional_call does so); use checkpointing 'none' or 'norms'"
            )
        return block._forward(*inputs)

    return checkpoint(forward, *args, use_reentrant=False)


def recompute_in_backward(
    result: Tensor, recompute: Callable[[], Tensor]
) -> contextlib.AbstractContextManager[Any]:
    """Recompute `result` in the backward pass of code in the context, instead of storing it.

    recompute: returns the values of `result`, bit for bit. Under torch.func and torch.compile, it is stored.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or in_transform():
        return contextlib.nullcontext()
    result_key = _view_key(result)  # not the tensor: the graph would keep it alive through `pack`

    def pack(saved: Tensor) -> Tensor | None:
        return None if _view_key(saved) == result_key else saved

    def unpack(saved: Tensor | None) -> Tensor:
        if saved is not None:
            return saved
        with torch.no_grad():
            return recompute()

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _view_key(t: Tensor) -> tuple[Any, ...]:
    """Return a key of the elements that a tensor views; tensors without memory have keys too."""
    return t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride()
