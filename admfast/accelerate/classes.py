"""Classes of converted modules: subclasses of one of ours and of the module's own.

A converted module stays the same object with the same parameters, hooks and mode. It pickles as a module of
its own class, which loads where admfast isn't; a deep copy stays converted.
"""

from __future__ import annotations

import copy
import copyreg
import functools
from typing import Any, ClassVar

from torch import nn


class Converted:
    """Mixin of a module whose class was exchanged."""

    original_class: ClassVar[type]
    _added: tuple[str, ...] = ()  # attributes that the conversion gave it

    def __copy__(self) -> Any:
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        state: Any = super().__getstate__()
        twin.__dict__.update(copy.deepcopy(state, memo))
        return twin

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state: Any = super().__getstate__()
        state = {name: value for name, value in state.items() if name not in (*self._added, "_added")}
        # Not by `__newobj__`: pickle insists that it is given the object's present class.
        return copyreg._reconstructor, (self.original_class, object, None), state  # type: ignore[attr-defined]


def convert(module: nn.Module, ours: type[nn.Module], **attributes: Any) -> None:
    """Exchange a module's class for one that is `ours` first and its own second; give it attributes."""
    module.__class__ = _joined(ours, type(module))  # type: ignore[arg-type]
    vars(module).update(attributes, _added=tuple(attributes))


@functools.cache
def _joined(ours: type[nn.Module], original: type[nn.Module]) -> type[nn.Module]:
    names = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(original.__name__, (Converted, ours, original), {**names, "original_class": original})


def own_class(module: nn.Module) -> type:
    """Return the class of a module, that before its conversion if it is converted."""
    return module.original_class if isinstance(module, Converted) else type(module)
