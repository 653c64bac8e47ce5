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


def empty_list(*_arguments: Any) -> list[Any]:
    """Return an empty list, whatever the arguments."""
    return []


@dataclass(frozen=True)
class OpCases:
    """The calls of one op.

    op: its name in TABLES; for a kernel without a table, a name of its own.
    call: call(**arguments, impl=NAME) returns the tensor or the tuple of tensors that the op makes or writes.
    arguments: arguments(draw, dtype, **case) returns the arguments of a call by name. With an empty case they
        are the example that `admfast info` runs. A case of a Triton kernel gives its batch size as `n`.
    small: at least two cases of odd sizes, which together reach every branch of the kernels.
    real: cases of the released networks, named by network and sizes.
    wrong: wrong() returns at least two pairs: arguments that replace those of the example, and the argument
        name that the error must begin with.
    differentiable: arguments that have gradients.
    dtype_of: the tensors that have the dtype, as `admfast info` shows it: "" for all; None: no tensor has it.
    call_raw_ops: for each implementation a function (call_op, **arguments), which calls its raw ops or
        launchers, forward and backward, through call_op(NAME, *arguments). Triton's ops have the names of the
        launchers in `kernels/`.
    launch_settings: values of names in `kernels/norm_launch.py` with which the small cases reach every
        kind of launch.
    cases_from_call: cases_from_call(*arguments) returns the cases of the kernels that a call of the op
        `launched_by` launches.
    launched_by: name of the op that launches a kernel without a table; "": `op`.
    """

    op: str
    call: Callable[..., Any]
    arguments: Callable[..., dict[str, Any]]
    small: tuple[Case, ...]
    real: Mapping[str, Case] = field(default_factory=dict)
    wrong: Callable[[], Iterable[tuple[dict[str, Any], str]]] = empty_list
    differentiable: tuple[str, ...] = ()
    dtype_of: str | None = ""
    call_raw_ops: Mapping[str, Callable[..., None]] = field(default_factory=dict)
    launch_settings: tuple[dict[str, Any], ...] = ({},)
    cases_from_call: Callable[..., Iterable[Case]] = empty_list
    launched_by: str = ""

    @property
    def implementations(self) -> list[str]:
        """Names that `call` accepts as `impl`."""
        return TABLES[self.op].names() if self.op in TABLES else [*self.call_raw_ops, "reference"]


def all_cases() -> list[OpCases]:
    """Return the cases of every op, folder by folder."""
    cases: list[OpCases] = []
    for room in ROOMS:
        cases += importlib.import_module(f"admfast.ops.{room}.cases").CASES
    return cases
