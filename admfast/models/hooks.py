"""Decide which blocks must run as published, layer by layer: those with hooks or replaced layers.

Normally, a block fuses several of its layers into one operation. There a hook would see other values than in
the published block, or would not run, and a replaced layer would be ignored. Blocks check this at every call,
except in the rows of a prepared step (`skip_hook_checks`). The rest of the network stays fused and folded.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.hooks import RemovableHandle

_THREAD = threading.local()


def has_hooks(modules: Iterable[nn.Module]) -> bool:
    """Tell whether one of `modules` has a hook or a replaced `forward`, or a global hook exists."""
    for module in modules:  # 0.2 us each
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in module.__dict__
        ):
            return True
    return _has_any_global_hook()


def must_call_as_published(module: nn.Module) -> bool:
    """Tell whether `module` must be called as in the published network, because it has a hook."""
    return not hook_checks_skipped() and has_hooks((module,)) and not _is_kept_fused()


def submodules(module: nn.Module) -> list[nn.Module]:
    """Return all modules below `module`, level by level; faster than the nested generators of `modules()`."""
    queue = [*module._modules.values()]
    for part in queue:  # `queue` grows during this loop
        if part is not None and part._modules:
            queue += part._modules.values()
    return [part for part in queue if part is not None]


class FusedBlock(nn.Module):
    """A block that runs some of its parts as one operation, unless one of them was hooked or replaced."""

    _part_types: tuple[type, ...] | None = None  # None: always runs layer by layer

    def _record_part_types(self) -> None:
        """Record the classes of the parts; call this at the end of `__init__`."""
        self._part_types = tuple(map(type, submodules(self)))

    def must_run_layer_by_layer(self) -> bool:
        """Tell whether the block must run layer by layer, not fused; takes 5 us for a residual block."""
        if hook_checks_skipped():
            return False
        parts = submodules(self)
        return tuple(map(type, parts)) != self._part_types or (has_hooks(parts) and not _is_kept_fused())


class ModuleSurvey(NamedTuple):
    """The properties of a network, besides its parameters, on which a prepared step depends.

    has_hooks: a hook exists, so Python must run at every evaluation. modules: the network and all its
    submodules. types: their classes.
    """

    has_hooks: bool
    modules: list[nn.Module]
    types: tuple[type, ...]


def survey_modules(net: nn.Module) -> ModuleSurvey:
    """Return the present survey of a network."""
    modules = [net, *submodules(net)]
    return ModuleSurvey(has_hooks(modules), modules, tuple(map(type, modules)))


@contextlib.contextmanager
def keep_fused() -> Iterator[None]:
    """Keep this thread's blocks fused within the context, despite hooks, which then see the fused values."""
    previous = _is_kept_fused()
    _THREAD.fused = True
    try:
        yield
    finally:
        _THREAD.fused = previous


def count_hooks_made() -> int:
    """Return how many hooks torch has registered so far, on anything, in this process."""
    return RemovableHandle.next_id


@contextlib.contextmanager
def skip_hook_checks(num_hooks: int | None) -> Iterator[None]:
    """Skip the checks of this thread's blocks within the context, until another hook is registered.

    num_hooks: the value of `count_hooks_made()` at a survey that found no hook and no replaced module;
    None if it found one, so that blocks must check.
    """
    previous = getattr(_THREAD, "num_hooks", None)
    _THREAD.num_hooks = num_hooks
    try:
        yield
    finally:
        _THREAD.num_hooks = previous


def hook_checks_skipped() -> bool:
    """Tell whether this thread's blocks may skip their checks, because a survey is still valid."""
    return not torch.compiler.is_compiling() and getattr(_THREAD, "num_hooks", None) == count_hooks_made()


def _is_kept_fused() -> bool:
    return not torch.compiler.is_compiling() and getattr(_THREAD, "fused", False)
