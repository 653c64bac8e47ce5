"""Ask what surrounds a call: transforms, traces, autocast, inference mode."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

T = TypeVar("T")


def constant(function: Callable[..., T]) -> Callable[..., T]:
    """Let a trace call the function once and take its answer, instead of following it.

    It does what torch.compiler.assume_constant_result does, which would import Dynamo and with it Triton.
    """

    @functools.wraps(function)
    def answer(*arguments: Any) -> T:  # a function of its own: Dynamo doesn't ask a functools.cache
        return function(*arguments)

    answer._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return answer


@contextlib.contextmanager
def deriving() -> Iterator[None]:
    """Leave inference mode, dispatch modes and the transforms of torch.func, and record nothing.

    What is made in inference mode could neither be written to nor serve a gradient later; what is made under
    a transform would be a tensor of its level, which ends with it; and under a mode without values, as
    torch's FakeTensorMode, it would have none.
    """
    with (
        temporarily_clear_interpreter_stack(),
        _disable_current_modes(),
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        yield


@constant  # a trace is itself guarded by the stack of transforms
def in_transform() -> bool:
    """Tell whether a transform of torch.func is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def outer_grad_enabled() -> bool:
    """Tell whether gradients are recorded; under transforms of torch.func, whether they are outside of all.

    A transform turns recording on for its own inputs; what requires a gradient outside of it gets one only
    where recording was on before.
    """
    if not in_transform() or torch.compiler.is_compiling():
        return torch.is_grad_enabled()
    for level in torch._C._functorch.get_interpreter_stack() or []:
        if level.key() == torch._C._functorch.TransformType.Grad:
            return torch._C._functorch.CGradInterpreterPtr(level).prevGradMode()
    return torch.is_grad_enabled()


def in_vmap() -> bool:
    """Tell whether torch.func.vmap is at work; a trace, which can't ask, is told no."""
    if torch.compiler.is_compiling():
        return False
    levels = torch._C._functorch.get_interpreter_stack() or []
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in levels)


def in_program() -> bool:
    """Tell whether torch.jit.trace or torch.export writes a program that may run where this package isn't."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return torch._C._is_tracing()


def in_forward_mode() -> bool:
    """Tell whether a forward-mode derivative is being taken."""
    return torch.autograd.forward_ad._current_level >= 0


def observed() -> bool:
    """Tell whether torch.jit.trace or a dispatch mode (a counter, fake tensors) looks on in eager mode.

    They know torch's own operations alone: ours would be counted as nothing, or missing where a trace is run.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._is_tracing() or torch._C._len_torch_dispatch_stack() > 0


def traced(*tensors: Tensor | None) -> bool:
    """Tell whether something must see every op: a trace, a transform, a mode or a tensor subclass."""
    return (
        torch.compiler.is_compiling()
        or in_transform()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.jit.is_tracing()
        or any(t is not None and type(t) not in (Tensor, torch.nn.Parameter) for t in tensors)
    )


def recorded(*tensors: Tensor | None) -> bool:
    """Tell whether a derivative or a trace of a call with these tensors is being made."""
    if torch.compiler.is_compiling() or in_transform():
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def in_autocast(device: torch.device) -> bool:
    """Tell whether torch.autocast is at work on that kind of device; there is none on others than these."""
    return device.type in ("cpu", "cuda") and torch.is_autocast_enabled(device.type)


def record(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply(*arguments)`, all arguments of its forward by position.

    Outside torch.func and torch.compile without what `apply` does for them: it looks up the signature of the
    forward at every call: 33 us for a Function of eight arguments that does nothing, instead of 4.
    """
    if torch.compiler.is_compiling() or in_transform():
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


def nobody_differentiates() -> bool:
    """Tell whether a backward that is running needs no graph of itself, and no transform looks on."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or in_transform())


def compiled_transform() -> str | None:
    """Refuse a Function over a raw op to a trace of torch.func.grad, which would silently get zeros."""
    if torch.compiler.is_compiling() and in_transform():
        return "torch.compile is tracing a transform of torch.func, which takes torch's own operations alone"
    return None


def transformed(*tensors: Tensor | None) -> str | None:
    """Name the transform of a tensor that only torch's own operations know; None where there is none."""
    if in_program():
        return "a traced program is made of torch's own operations"
    if torch.compiler.is_compiling():
        return compiled_transform()
    forward_mode = in_forward_mode()
    if not forward_mode and not in_transform():
        return None
    for t in tensors:
        if t is None:
            continue
        if torch._C._functorch.is_batchedtensor(t):
            return "one of the tensors is a batch of vmap"
        if forward_mode and torch.autograd.forward_ad.unpack_dual(t)[1] is not None:
            return "a forward-mode derivative is being taken, which is the reference's alone"
    return None
