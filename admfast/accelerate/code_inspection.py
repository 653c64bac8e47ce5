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

LIBRARY_NAMES = {"th", "torch", "nn", "F", "np", "math", "utils", "functional"}
PUBLISHED_BLOCK_NAMES = LIBRARY_NAMES | {
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
NORM_NAMES = LIBRARY_NAMES | {
    *("super", "forward", "float", "type", "dtype", "to"),
    *("group_norm", "num_groups", "weight", "bias", "eps"),
}
ACTIVATION_NAMES = LIBRARY_NAMES | {"sigmoid", "silu"}
EMBEDDING_NAMES = LIBRARY_NAMES | {
    *("exp", "log", "arange", "float32", "float", "to", "device", "cat", "cos", "sin", "zeros_like", "dtype"),
    *("concatenate", "pad", "pow", "shape", "view"),
}
SWITCH_NAMES = {"class_cond"}
_CHANGING_OPCODES = (
    *("STORE_ATTR", "STORE_SUBSCR", "STORE_SLICE", "STORE_GLOBAL", "STORE_DEREF", "STORE_NAME", "DELETE_"),
    *("UNARY_", "COMPARE_OP", "CONTAINS_OP", "FOR_ITER", "GET_ITER", "YIELD", "SEND", "IMPORT", "MAKE_F"),
)
ALLOWED_NUMBERS = {-2, -1, 0, 1, 2, 3, 4, -0.5, 0.5, -0.25, 0.25}


def find_class_difference(cls: type, names: set[str], numbers: set[Any] = ALLOWED_NUMBERS) -> str | None:
    """Say what a module's class does beyond the published one; None if nothing was found.

    names: attributes and functions that it may use. numbers: numbers that it may contain.
    """
    for base in cls.__mro__:
        if base is object or base.__module__.partition(".")[0] == "torch":
            continue
        if "__call__" in vars(base) or "__getattr__" in vars(base):
            return "has a __call__ or __getattr__ of its own"
        properties = [name for name, value in vars(base).items() if isinstance(value, property)]
        if names & set(properties):
            return f"computes {', '.join(sorted(names & set(properties)))} at each use"
        for name in ("forward", "_forward"):
            if name in vars(base) and (reason := find_function_difference(vars(base)[name], names, numbers)):
                return f"{name} {reason}"
    return None


def find_function_difference(
    function: Any, names: set[str], numbers: set[Any] = ALLOWED_NUMBERS, closure_names: Set[str] = frozenset()
) -> str | None:
    """Say what a function does beyond the published one; None if nothing was found.

    names, numbers: see `find_class_difference`. closure_names: closure variables that it may use.
    """
    if not inspect.isfunction(function) or hasattr(function, "__wrapped__"):
        return "is decorated"
    if set(function.__code__.co_freevars) - {"__class__"} - closure_names:
        return "uses variables of another function"
    names_used, constants = _names_and_constants(function.__code__)
    if names_used - names:
        return f"uses {', '.join(sorted(names_used - names)[:3])}, which the published one doesn't"
    other_numbers = {c for c in constants if isinstance(c, int | float | complex) and c not in numbers}
    if other_numbers:
        return (
            f"uses {', '.join(map(str, sorted(other_numbers, key=str)[:3]))}, which the published one doesn't"
        )
    return None


def _names_and_constants(code: CodeType) -> tuple[set[str], set[Any]]:
    """Return the names and constants in a function and in the functions that it defines."""
    names, constants, pending = set(code.co_names), set[Any](), list[Any](code.co_consts)
    while pending:
        constant = pending.pop()
        if isinstance(constant, CodeType):
            inner_names, inner_constants = _names_and_constants(constant)
            names |= inner_names
            constants |= inner_constants
        elif isinstance(constant, tuple | frozenset):
            pending += constant
        elif isinstance(constant, slice):
            pending += [constant.start, constant.stop, constant.step]
        elif not isinstance(constant, str):
            constants.add(constant)
    return names, constants


class CodeRecord:
    """Record of the code that a network runs: (namespace, name, value) of methods, functions and modules."""

    def __init__(self, entries: Iterable[tuple[Mapping[str, Any], str, Any]] = ()) -> None:
        self.entries = tuple(entries)

    def is_unchanged(self) -> bool:
        """Tell whether every name still has its recorded value."""
        return all(namespace.get(name) is value for namespace, name, value in self.entries)

    def __deepcopy__(self, memo: Any) -> CodeRecord:
        return self


def record_code(net: nn.Module) -> CodeRecord:
    """Return the forward methods of a network's modules, and the functions, classes and modules they name."""
    classes = dict.fromkeys(cls for module in net.modules() for cls in type(module).__mro__)
    program_classes = [
        cls for cls in classes if cls is not object and cls.__module__.partition(".")[0] != "torch"
    ]
    methods = [
        (cls.__dict__, name, method)
        for cls in program_classes
        for name, method in vars(cls).items()
        if name.startswith(("forward", "_forward"))
    ]
    named_objects: dict[tuple[int, str], tuple[Mapping[str, Any], str, Any]] = {}
    for _, _, method in methods:
        globals_of_method = getattr(method, "__globals__", {})
        for name in getattr(getattr(method, "__code__", None), "co_names", ()):
            value = globals_of_method.get(name)
            if inspect.isroutine(value) or inspect.ismodule(value) or inspect.isclass(value):
                named_objects[id(globals_of_method), name] = (globals_of_method, name, value)
    return CodeRecord([*methods, *named_objects.values()])


def find_branch(function: Any) -> str | None:
    """Say whether a function branches, compares or writes to objects; None if it is straight-line code.

    Tests for None, and tests of a name in `SWITCH_NAMES`, are allowed.
    """
    previous = ""
    for instruction in dis.get_instructions(function):
        if instruction.opname in ("TO_BOOL", "CACHE", "EXTENDED_ARG", "NOP"):
            continue
        jump = "JUMP" in instruction.opname and not instruction.opname.startswith("JUMP_FORWARD")
        if jump and not (
            "NONE" in instruction.opname or previous in SWITCH_NAMES or previous == "WITH_EXCEPT_START"
        ):
            return "branches"
        if instruction.opname.startswith(_CHANGING_OPCODES) or (
            instruction.opname == "BINARY_OP" and instruction.argrepr.endswith("=")
        ):
            return f"changes or compares something ({instruction.opname})"
        previous = str(instruction.argval) if instruction.opname.startswith("LOAD_") else instruction.opname
    return None


def has_comparison_other_than_equality(function: Any) -> bool:
    """Tell whether a function makes any comparison other than `==`."""
    instructions = dis.get_instructions(function)
    return any(
        instruction.opname == "COMPARE_OP" and "==" not in instruction.argrepr for instruction in instructions
    )
