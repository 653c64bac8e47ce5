"""Query the context of a call: transforms, traces, autocast, inference mode."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

T = TypeVar("T")


def constant_while_tracing(function: Callable[..., T]) -> Callable[..., T]:
    """Let torch.compile call the function once and use its result as a constant, instead of tracing it.

    Does the same as torch.compiler.assume_constant_result, which would import Dynamo and through it Triton.
    """

    @functools.wraps(function)
    def wrapper(*arguments: Any) -> T:  # a wrapper: Dynamo ignores the mark on a functools.cache object
        return function(*arguments)

    wrapper._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return wrapper


@contextlib.contextmanager
def plain_eager_mode() -> Iterator[None]:
    """Leave inference mode, dispatch modes and torch.func's transforms within the block; record no gradients.

    Use it to make tensors that are kept after the call. A tensor made in inference mode could not be written
    to, or used for a gradient, later. One made under a transform would belong to the transform's level and
    end with it. One made under a mode such as torch's FakeTensorMode would have no values.
    """
    with (
        temporarily_clear_interpreter_stack(),
        _disable_current_modes(),
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        yield


@constant_while_tracing  # correct in a trace, because Dynamo guards each trace by the stack of transforms
def in_transform() -> bool:
    """Tell whether a transform of torch.func is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def outer_grad_enabled() -> bool:
    """Tell whether gradients are recorded outside of all transforms of torch.func.

    A transform turns recording on for its own inputs. A tensor that requires a gradient outside of the
    transform gets one only if recording was already on there.
    """
    if not in_transform() or torch.compiler.is_compiling():
        return torch.is_grad_enabled()
    for level in torch._C._functorch.get_interpreter_stack() or []:
        if level.key() == torch._C._functorch.TransformType.Grad:
            return torch._C._functorch.CGradInterpreterPtr(level).prevGradMode()
    return torch.is_grad_enabled()


def in_vmap() -> bool:
    """Tell whether torch.func.vmap is active; always False in a trace, which can't query it."""
    if torch.compiler.is_compiling():
        return False
    levels = torch._C._functorch.get_interpreter_stack() or []
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in levels)


def in_program_trace() -> bool:
    """Tell whether torch.jit.trace or torch.export records a program, which may run without this package."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return torch._C._is_tracing()


def in_forward_mode() -> bool:
    """Tell whether a forward-mode derivative is being taken."""
    return torch.autograd.forward_ad._current_level >= 0


_PACKAGE_MODES = threading.local()


@contextlib.contextmanager
def package_dispatch_mode() -> Iterator[None]:
    """Mark the block as inside a dispatch mode of this package, which changes no choice of implementation."""
    _PACKAGE_MODES.count = _package_mode_count() + 1
    try:
        yield
    finally:
        _PACKAGE_MODES.count -= 1


def _package_mode_count() -> int:
    return getattr(_PACKAGE_MODES, "count", 0)


def _in_foreign_dispatch_mode() -> bool:
    """Tell whether this thread is in a dispatch mode of another package."""
    return torch._C._len_torch_dispatch_stack() > _package_mode_count()


def has_op_observer() -> bool:
    """Tell whether torch.jit.trace or a dispatch mode (a FLOP counter, fake tensors) is active in eager mode.

    Both know only torch's own operations. They would count ours as zero, or the traced program would lack
    them.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._is_tracing() or _in_foreign_dispatch_mode()


def is_intercepted(*tensors: Tensor | None) -> bool:
    """Tell whether something must see every op: a trace, a transform, a dispatch mode, a tensor subclass."""
    return (
        torch.compiler.is_compiling()
        or in_transform()
        or _in_foreign_dispatch_mode()
        or torch.jit.is_tracing()
        or any(t is not None and type(t) not in (Tensor, torch.nn.Parameter) for t in tensors)
    )


def needs_autograd(*tensors: Tensor | None) -> bool:
    """Tell whether a call with these tensors is recorded for a gradient, traced, or transformed."""
    if torch.compiler.is_compiling() or in_transform():
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def in_autocast(device: torch.device) -> bool:
    """Tell whether torch.autocast is active for this kind of device; False for all but CPU and CUDA."""
    return device.type in ("cpu", "cuda") and torch.is_autocast_enabled(device.type)


def apply_autograd(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Return `function.apply(*arguments)`, with all arguments of its forward given by position.

    Outside torch.func and torch.compile, skip the work that `apply` does only for them. `apply` looks up the
    signature of the forward at every call: a Function of eight arguments that does nothing takes 33 us
    instead of 4.
    """
    if torch.compiler.is_compiling() or in_transform():
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


def is_final_backward() -> bool:
    """Tell whether nothing differentiates the running backward: no graph of it, no trace, no transform."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or in_transform())


def reason_compiled_transform() -> str | None:
    """Return the reason against an autograd Function over a raw op while a transform is compiled, or None.

    With such a Function, a compiled torch.func.grad would silently give zeros.
    """
    if torch.compiler.is_compiling() and in_transform():
        return "torch.compile is tracing a transform of torch.func, which needs torch's own operations"
    return None


def reason_torch_ops_only(*tensors: Tensor | None) -> str | None:
    """Return why a call with these tensors needs torch's own operations (a transform, a trace), or None."""
    if in_program_trace():
        return "a traced program may contain only torch's own operations"
    if torch.compiler.is_compiling():
        return reason_compiled_transform()
    forward_mode = in_forward_mode()
    if not forward_mode and not in_transform():
        return None
    for t in tensors:
        if t is None:
            continue
        if torch._C._functorch.is_batchedtensor(t):
            return "one of the tensors is a batch of vmap"
        if forward_mode and torch.autograd.forward_ad.unpack_dual(t)[1] is not None:
            return "only the reference supports forward-mode derivatives"
    return None
