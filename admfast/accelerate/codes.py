"""Find what a program's code does beyond the published code: other names and numbers, decorators, branches.

Trials on small inputs can't show everything: code may depend on large sizes, on training mode, or on
attributes that change later. Code that uses only the published names and small numbers has little room for
that; trials of several sizes find the rest.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterable, Mapping, Set
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
EMBEDDING = LIBRARIES | {
    *("exp", "log", "arange", "float32", "float", "to", "device", "cat", "cos", "sin", "zeros_like", "dtype"),
    *("concatenate", "pad", "pow", "shape", "view"),
}
SWITCHES = {"class_cond"}
_CHANGES = (
    *("STORE_ATTR", "STORE_SUBSCR", "STORE_SLICE", "STORE_GLOBAL", "STORE_DEREF", "STORE_NAME", "DELETE_"),
    *("UNARY_", "COMPARE_OP", "CONTAINS_OP", "FOR_ITER", "GET_ITER", "YIELD", "SEND", "IMPORT", "MAKE_F"),
)
NUMBERS = {-2, -1, 0, 1, 2, 3, 4, -0.5, 0.5, -0.25, 0.25}


def foreign(cls: type, names: set[str], numbers: set[Any] = NUMBERS) -> str | None:
    """Say what a module's class does beyond the published one; None if nothing was found.

    names: attributes and functions that it may use. numbers: numbers that it may contain.
    """
    for part in cls.__mro__:
        if part is object or part.__module__.partition(".")[0] == "torch":
            continue
        if "__call__" in vars(part) or "__getattr__" in vars(part):
            return "has a __call__ or __getattr__ of its own"
        computed = [name for name, value in vars(part).items() if isinstance(value, property)]
        if names & set(computed):
            return f"computes {', '.join(sorted(names & set(computed)))} at each use"
        for name in ("forward", "_forward"):
            if name in vars(part) and (reason := foreign_function(vars(part)[name], names, numbers)):
                return f"{name} {reason}"
    return None


def foreign_function(
    function: Any, names: set[str], numbers: set[Any] = NUMBERS, around: Set[str] = frozenset()
) -> str | None:
    """Say what a function does beyond the published one; None if nothing was found.

    names, numbers: see `foreign`. around: closure variables that it may use.
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
    """Return the names and constants in a function and in the functions that it defines."""
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


class Code:
    """Record of the code that a network runs: (namespace, name, value) of methods, functions and modules."""

    def __init__(self, entries: Iterable[tuple[Mapping[str, Any], str, Any]] = ()) -> None:
        self.entries = tuple(entries)

    def holds(self) -> bool:
        """Tell whether every name still has its recorded value."""
        return all(held.get(name) is value for held, name, value in self.entries)

    def __deepcopy__(self, memo: Any) -> Code:
        return self


def code_of(net: nn.Module) -> Code:
    """Return the forward methods of a network's modules, and the functions, classes and modules they name."""
    classes = dict.fromkeys(part for module in net.modules() for part in type(module).__mro__)
    own = [part for part in classes if part is not object and part.__module__.partition(".")[0] != "torch"]
    methods = [
        (part.__dict__, name, method)
        for part in own
        for name, method in vars(part).items()
        if name.startswith(("forward", "_forward"))
    ]
    named: dict[tuple[int, str], tuple[Mapping[str, Any], str, Any]] = {}
    for _, _, method in methods:
        around = getattr(method, "__globals__", {})
        for name in getattr(getattr(method, "__code__", None), "co_names", ()):
            value = around.get(name)
            if inspect.isroutine(value) or inspect.ismodule(value) or inspect.isclass(value):
                named[id(around), name] = (around, name, value)
    return Code([*methods, *named.values()])


def branches(function: Any) -> str | None:
    """Say whether a function branches, compares or writes to objects; None if it is straight-line code.

    Tests for None, and tests of a name in `SWITCHES`, are allowed.
    """
    before = ""
    for step in dis.get_instructions(function):
        if step.opname in ("TO_BOOL", "CACHE", "EXTENDED_ARG", "NOP"):
            continue
        jump = "JUMP" in step.opname and not step.opname.startswith("JUMP_FORWARD")
        if jump and not ("NONE" in step.opname or before in SWITCHES or before == "WITH_EXCEPT_START"):
            return "branches"
        if step.opname.startswith(_CHANGES) or (step.opname == "BINARY_OP" and step.argrepr.endswith("=")):
            return f"changes or compares something ({step.opname})"
        before = str(step.argval) if step.opname.startswith("LOAD_") else step.opname
    return None


def compares(function: Any) -> bool:
    """Tell whether a function makes any comparison other than `==`."""
    steps = dis.get_instructions(function)
    return any(step.opname == "COMPARE_OP" and "==" not in step.argrepr for step in steps)
