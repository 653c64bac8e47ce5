"""Convert a module in place to a class that derives from one of ours and from its own; convert it back.

A converted module stays the same object with the same parameters, hooks and mode. It is pickled as a module
of its original class, so that it loads without admfast; a deep copy stays converted.
"""

from __future__ import annotations

import copy
import copyreg
import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from torch import nn


class Converted:
    """Mixin of a module whose class was changed."""

    original_class: ClassVar[type]
    # Attributes that the conversion added, and the former values of those that it changed.
    _added_attributes: tuple[str, ...] = ()
    _replaced_attributes: Mapping[str, Any] = MappingProxyType({})

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
        state = _state_before_conversion(state)
        # `__newobj__` can't be used: pickle requires the object's current class there.
        return copyreg._reconstructor, (self.original_class, object, None), state  # type: ignore[attr-defined]


def convert(module: nn.Module, ours: type[nn.Module], **attributes: Any) -> None:
    """Change a module's class to a subclass of `ours` and of its own class, in this order; set attributes."""
    module.__class__ = _combined_class(ours, type(module))  # type: ignore[arg-type]
    state = vars(module)
    replaced = {name: state[name] for name in attributes if name in state}
    added = tuple(name for name in attributes if name not in state)
    state.update(attributes, _added_attributes=added, _replaced_attributes=replaced)


def restore(module: Converted) -> None:
    """Give a converted module its original class and attributes back."""
    state = _state_before_conversion(module.__getstate__())  # type: ignore[attr-defined, arg-type]
    module.__class__ = module.original_class
    vars(module).clear()
    vars(module).update(state)


def _state_before_conversion(state: dict[str, Any]) -> dict[str, Any]:
    """Return a module's attributes as they were before its conversion."""
    to_remove = {*state.get("_added_attributes", ()), "_added_attributes", "_replaced_attributes"}
    kept = {name: value for name, value in state.items() if name not in to_remove}
    return kept | dict(state.get("_replaced_attributes", {}))


@functools.cache
def _combined_class(ours: type[nn.Module], original: type[nn.Module]) -> type[nn.Module]:
    names = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(original.__name__, (Converted, ours, original), {**names, "original_class": original})


def original_class_of(module: nn.Module) -> type:
    """Return the class of a module; of a converted one, its class before the conversion."""
    return module.original_class if isinstance(module, Converted) else type(module)
