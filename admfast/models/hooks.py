"""Decide which blocks must run as published, layer by layer: those with hooks or replaced layers.

Normally, a block fuses several of its layers into one operation. There a hook would see other values than in
the published block, or would not run, and a replaced layer would be ignored. Blocks check this at every call,
except in the rows of a prepared step (`surveyed`). The rest of the network stays fused and folded.
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


def hooked(modules: Iterable[nn.Module]) -> bool:
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


def watched(module: nn.Module) -> bool:
    """Tell whether `module` must be called as in the published network, because it has a hook."""
    return not spared() and hooked((module,)) and not _stays_fused()


def parts(module: nn.Module) -> list[nn.Module]:
    """Return all modules below `module`, level by level; faster than the nested generators of `modules()`."""
    found = [*module._modules.values()]
    for part in found:  # `found` grows during this loop
        if part is not None and part._modules:
            found += part._modules.values()
    return [part for part in found if part is not None]


class FusedBlock(nn.Module):
    """A block that runs some of its parts as one operation, unless one of them was hooked or replaced."""

    _kinds: tuple[type, ...] | None = None  # None: the parts always run one by one

    def _built(self) -> None:
        """Record the classes of the parts; call this at the end of `__init__`."""
        self._kinds = tuple(map(type, parts(self)))

    def as_published(self) -> bool:
        """Tell whether the parts must run one by one; takes 5 us for a residual block, less if `spared`."""
        if spared():
            return False
        found = parts(self)
        return tuple(map(type, found)) != self._kinds or (hooked(found) and not _stays_fused())


class Survey(NamedTuple):
    """The properties of a network, besides its parameters, on which a prepared step depends.

    hooked: a hook exists, so Python must run at every evaluation. modules: the network and all modules below
    it. kinds: their classes.
    """

    hooked: bool
    modules: list[nn.Module]
    kinds: tuple[type, ...]


def survey(net: nn.Module) -> Survey:
    """Return the present survey of a network."""
    found = [net, *parts(net)]
    return Survey(hooked(found), found, tuple(map(type, found)))


@contextlib.contextmanager
def staying_fused() -> Iterator[None]:
    """Keep this thread's blocks fused within the context, despite hooks, which then see the fused values."""
    before = _stays_fused()
    _THREAD.fused = True
    try:
        yield
    finally:
        _THREAD.fused = before


def hooks_made() -> int:
    """Return how many hooks torch has registered so far, on anything, in this process."""
    return RemovableHandle.next_id


@contextlib.contextmanager
def surveyed(made: int | None) -> Iterator[None]:
    """Skip the checks of this thread's blocks within the context, until another hook is registered.

    made: the value of `hooks_made()` at a survey that found no hook and no replaced module; None if it found
    one, so that blocks must check.
    """
    before = getattr(_THREAD, "made", None)
    _THREAD.made = made
    try:
        yield
    finally:
        _THREAD.made = before


def spared() -> bool:
    """Tell whether this thread's blocks may skip their checks, because a survey is still valid."""
    return not torch.compiler.is_compiling() and getattr(_THREAD, "made", None) == hooks_made()


def _stays_fused() -> bool:
    return not torch.compiler.is_compiling() and getattr(_THREAD, "fused", False)
