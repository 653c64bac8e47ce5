"""Tell which blocks must run as published, module by module: those with a hook or a layer put in by a user.

A block runs several of its layers as one operation, in which a hook would see other values than in the
published block, or none, and for which a layer of another class has no place. Blocks ask anew at every call,
except in the rows of a prepared step (`surveyed`); the rest of the network stays fused and folded.
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
    """Tell whether a hook watches one of `modules`, or all there are, or a `forward` was replaced."""
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
    """Tell whether `module` must be called as the published one is."""
    return not spared() and hooked((module,)) and not _stays_fused()


def parts(module: nn.Module) -> list[nn.Module]:
    """Return all modules below `module`, level by level; `modules()` would pass each through many hands."""
    found = [*module._modules.values()]
    for part in found:  # which grows meanwhile
        if part is not None and part._modules:
            found += part._modules.values()
    return [part for part in found if part is not None]


class FusedBlock(nn.Module):
    """A block that runs some of its parts as one operation while nobody hooked or replaced any of them."""

    _kinds: tuple[type, ...] | None = None  # None: the parts always run one by one

    def _built(self) -> None:
        """Note the classes of the parts; to be called at the end of `__init__`."""
        self._kinds = tuple(map(type, parts(self)))

    def as_published(self) -> bool:
        """Tell whether the parts must run one by one: 5 us for a residual block, less where it is spared."""
        if spared():
            return False
        found = parts(self)
        return tuple(map(type, found)) != self._kinds or (hooked(found) and not _stays_fused())


class Survey(NamedTuple):
    """Record of what a prepared step depends on beside the parameters of its network.

    hooked: Python must run at every evaluation. modules, kinds: the network and all below, and their classes.
    """

    hooked: bool
    modules: list[nn.Module]
    kinds: tuple[type, ...]


def survey(net: nn.Module) -> Survey:
    """Look over the modules of a network."""
    found = [net, *parts(net)]
    return Survey(hooked(found), found, tuple(map(type, found)))


@contextlib.contextmanager
def staying_fused() -> Iterator[None]:
    """Let hooks of this thread see within the block what runs, not what is published."""
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
    """Spare this thread's blocks the look at their parts within the block, until another hook is registered.

    made: `hooks_made` when a survey found no hook and no other module; None where it found one.
    """
    before = getattr(_THREAD, "made", None)
    _THREAD.made = made
    try:
        yield
    finally:
        _THREAD.made = before


def spared() -> bool:
    """Tell whether a survey that still holds answers for this thread's blocks."""
    return not torch.compiler.is_compiling() and getattr(_THREAD, "made", None) == hooks_made()


def _stays_fused() -> bool:
    return not torch.compiler.is_compiling() and getattr(_THREAD, "fused", False)
