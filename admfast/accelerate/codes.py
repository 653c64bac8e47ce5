"""Read a class's code for what its make's published code doesn't use: other names, numbers, decorators.

Results on small inputs can't show everything: what depends on sizes, on training, on attributes that change
later. A formula made of published names and small numbers alone has no room for these.
"""

from __future__ import annotations

import inspect
from collections.abc import Set
from types import CodeType
from typing import Any

from torch import nn

LIBRARIES = {"th", "torch", "nn", "F", "np", "math", "utils", "functional"}
BLOCKS = LIBRARIES | {
    *(
        "forward",
        "_forward",
        "super",
        "checkpoint",
        "parameters",
        "use_checkpoint",
        "isinstance",
        "len",
        "int",
    ),
    *("in_layers", "out_layers", "emb_layers", "skip_connection", "h_upd", "x_upd", "updown"),
    *("use_scale_shift_norm", "norm", "qkv", "attention", "proj_out", "n_heads", "num_heads", "legacy"),
    *("conv", "op", "use_conv", "dims", "channels", "out_channels", "interpolate", "TimestepBlock"),
    *("type", "dtype", "float", "to", "shape", "reshape", "view", "flatten", "transpose", "permute"),
    *("contiguous", "chunk", "split", "einsum", "bmm", "matmul", "softmax", "sqrt", "prod"),
    "scaled_dot_product_attention",
}
NORM = LIBRARIES | {
    *("super", "forward", "float", "type", "dtype", "to"),
    *("group_norm", "num_groups", "weight", "bias", "eps"),
}
ACTIVATION = LIBRARIES | {"sigmoid", "silu"}
NUMBERS = {-2, -1, 0, 1, 2, 3, 4, -0.5, 0.5, -0.25, 0.25}


def foreign(cls: type, names: set[str], numbers: set[Any] = NUMBERS) -> str | None:
    """Say what a module's class does beyond the published one; None where nothing is seen.

    names: of attributes and functions that the published class uses. numbers: that it may contain.
    """
    for part in cls.__mro__:
        if part is object or part.__module__.partition(".")[0] == "torch":
            continue
        if "__call__" in vars(part) or "__getattr__" in vars(part):
            return "has a __call__ or __getattr__ of its own"
        for name in ("forward", "_forward"):
            if name in vars(part) and (reason := foreign_function(vars(part)[name], names, numbers)):
                return f"{name} {reason}"
    return None


def foreign_function(
    function: Any, names: set[str], numbers: set[Any] = NUMBERS, around: Set[str] = frozenset()
) -> str | None:
    """Say what a function does beyond the published one; None where nothing is seen.

    around: variables of another function that it may use.
    """
    if not inspect.isfunction(function) or hasattr(function, "__wrapped__"):
        return "is decorated"
    if set(function.__code__.co_freevars) - {"__class__"} - around:
        return "uses variables of another function"
    used, constants = _used(function.__code__)
    if used - names:
        return f"uses {', '.join(sorted(used - names)[:3])}, which the published one doesn't"
    others = {c for c in constants if isinstance(c, int | float | complex) and c not in numbers}
    if others:
        return f"uses {', '.join(map(str, sorted(others, key=str)[:3]))}, which the published one doesn't"
    return None


def _used(code: CodeType) -> tuple[set[str], set[Any]]:
    """Return the names and constants of a function and of those within it."""
    names, constants, left = set(code.co_names), set[Any](), list[Any](code.co_consts)
    while left:
        constant = left.pop()
        if isinstance(constant, CodeType):
            more, others = _used(constant)
            names |= more
            constants |= others
        elif isinstance(constant, tuple | frozenset):
            left += constant
        elif isinstance(constant, slice):
            left += [constant.start, constant.stop, constant.step]
        elif not isinstance(constant, str):
            constants.add(constant)
    return names, constants


def methods_of(net: nn.Module) -> list[tuple[type, str, Any]]:
    """Return the methods that the modules of a network run by, as their classes hold them now."""
    classes = dict.fromkeys(part for module in net.modules() for part in type(module).__mro__)
    own = [part for part in classes if part is not object and part.__module__.partition(".")[0] != "torch"]
    names = ("forward", "_forward")
    return [(part, name, vars(part)[name]) for part in own for name in names if name in vars(part)]
