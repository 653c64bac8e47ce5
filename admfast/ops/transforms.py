"""Which transforms are at work on a call: forward mode, vmap, torch.func under torch.compile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _in_transform() -> bool:
    """Whether a transform of torch.func is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None


# A trace takes the answer it finds here, and is itself guarded by the stack of transforms.
_in_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]


def record(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply(*arguments)`, all arguments of its forward by position.

    Outside torch.func and torch.compile without what `apply` does for them: it looks up the signature of the
    forward at every call, which takes 25 us, as long as a small kernel.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


def nobody_differentiates() -> bool:
    """Whether a backward that is running needs no graph of itself, and no transform looks on."""
    return not torch.is_grad_enabled() and not (
        torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    )


def compiled_transform() -> str | None:
    """Why a Function over a raw op can't serve a trace: torch.func.grad in it would get zeros, silently."""
    if torch.compiler.is_compiling() and _in_transform():
        return "torch.compile is tracing a transform of torch.func, which takes torch's own operations alone"
    return None


def transformed(*tensors: Tensor | None) -> str | None:
    """Which transform of one of the tensors only torch's own operations know; None where there is none."""
    if torch.compiler.is_compiling():
        return compiled_transform()
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    if not forward_mode and not torch._C._are_functorch_transforms_active():
        return None
    for t in tensors:
        if t is None:
            continue
        if torch._C._functorch.is_batchedtensor(t):
            return "one of the tensors is a batch of vmap"
        if forward_mode and torch.autograd.forward_ad.unpack_dual(t)[1] is not None:
            return "a forward-mode derivative is being taken, which is the reference's alone"
    return None
