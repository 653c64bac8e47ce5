"""Describe synthetic calls of every op, for `admfast info`, tests, sanitizers and benches.

The `cases.py` in each folder of an op describes its ops in CASES. Readers use `all_cases`, which finds a new
folder without further changes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from admfast.ops import ROOMS, TABLES

Case = dict[str, Any]  # keyword arguments of `OpCases.arguments`: sizes and options of one call
Draw = Callable[..., Tensor]  # draw(*sizes): random float32 values on the device of the call


def nothing(*_arguments: Any) -> list[Any]:
    """Return an empty list: the default of the functions that an op may lack."""
    return []


@dataclass(frozen=True)
class OpCases:
    """The calls of one op.

    op: its name in TABLES; for a kernel without a table, a name of its own.
    call: call(**arguments, impl=NAME) returns the tensor or the tuple of tensors that the op makes or writes.
    arguments: arguments(draw, dtype, **case) returns the arguments of a call by name. With an empty case they
        are the example that `admfast info` runs. A case of a Triton kernel gives its batch size as `n`.
    small: cases of odd sizes that reach every branch of the kernels.
    real: cases of the released networks, named by network and sizes.
    wrong: wrong() returns pairs: arguments that replace those of the example, and the argument name that the
        error must begin with.
    differentiable: arguments that have gradients.
    typed: which tensors have the dtype, as `admfast info` shows it: "" for all; None: no tensor has it.
    raw: for each implementation raw(call, **arguments), which calls its raw ops or launchers, forward and
        backward, through call(NAME, *arguments). Triton's ops have the names of the launchers in `kernels/`.
    launches: settings of `kernels/norm_launch.py` with which the small cases reach every kind of launch.
    case_of: case_of(*arguments) returns the cases of the kernels that a call of an op launches; the op is
        `within`, or `op` if `within` is empty.
    """

    op: str
    call: Callable[..., Any]
    arguments: Callable[..., dict[str, Any]]
    small: tuple[Case, ...]
    real: Mapping[str, Case] = field(default_factory=dict)
    wrong: Callable[[], Iterable[tuple[dict[str, Any], str]]] = nothing
    differentiable: tuple[str, ...] = ()
    typed: str | None = ""
    raw: Mapping[str, Callable[..., None]] = field(default_factory=dict)
    launches: tuple[dict[str, int], ...] = ({},)
    case_of: Callable[..., Iterable[Case]] = nothing
    within: str = ""

    @property
    def implementations(self) -> list[str]:
        """Names that `call` accepts as `impl`."""
        return TABLES[self.op].names() if self.op in TABLES else [*self.raw, "reference"]


def all_cases() -> list[OpCases]:
    """Return the cases of every op, folder by folder."""
    found: list[OpCases] = []
    for room in ROOMS:
        found += importlib.import_module(f"admfast.ops.{room}.cases").CASES
    return found
