"""Describe calls of ops that need no image, for `admfast info`, tests, sanitizers and benches.

Every room's `cases.py` describes its ops in CASES. Readers go through `all_cases`, so that all of them find a
new room.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from admfast.ops import ROOMS, TABLES

Case = dict[str, Any]  # the arguments by name of a function that makes a call's arguments
Draw = Callable[..., Tensor]  # draw(*sizes): float32 values where the call is to run


def nothing(*_arguments: Any) -> list[Any]:
    """Return no case: the default of what an op need not have."""
    return []


@dataclass(frozen=True)
class OpCases:
    """The calls of one op.

    op: its name in TABLES; a kernel that has no table of its own has a name of its own.
    call: call(**arguments, impl=NAME) -> the tensors that it makes or writes, one or a tuple.
    arguments: arguments(draw, dtype, **case) -> a call's arguments by name. Without a case it is the example
        that `admfast info` runs. A case of a Triton kernel says its batch as `n`.
    small: cases of odd sizes that reach every branch of the kernels.
    real: cases of the released networks, by whose they are and their sizes.
    wrong: wrong() -> pairs of arguments that replace the example's and the name that the refusal begins with.
    differentiable: arguments that have gradients. typed: what has the dtype, "" for all; None for nothing.
    raw: implementation -> raw(call, **arguments), which gives the raw ops or launchers of that implementation
        to call(NAME, *arguments), forward and backward. Those of Triton have one name as ops and as launchers
        of `kernels/`.
    launches: settings of `kernels/norm_launch.py` under which small cases take every way of launching.
    case_of: case_of(*arguments) -> the cases of the kernels that one call of the op `within` needs.
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
        """The names that `call` takes as `impl`."""
        return TABLES[self.op].names() if self.op in TABLES else [*self.raw, "reference"]


def all_cases() -> list[OpCases]:
    """Return the cases of every op, room by room."""
    found: list[OpCases] = []
    for room in ROOMS:
        found += importlib.import_module(f"admfast.ops.{room}.cases").CASES
    return found
