"""Choose the implementation of an op: one ordered table per op, and one rule for choosing from it.

The rule: `impl=NAME` decides, else the environment variable ADMFAST_IMPL. If neither names an implementation,
the first entry of the table runs that is available, may be chosen without being named, and supports the call;
the entry that was measured to be the fastest for the call (`prefer`) is tried before the others. A named
implementation that can't run raises `Unavailable` with the reason; there is no silent fallback.

ADMFAST_IMPL is a comma-separated list of `NAME` (for every op) and `OP=NAME` (for one op; it overrides
`NAME`).
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from admfast.errors import Unavailable, allowed_names, invalid

IMPL_VARIABLE = "ADMFAST_IMPL"


def _return_none(*_args: Any, **_kwargs: Any) -> None:
    """Return None: no reason against an implementation, or no preferred one."""
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to run an op.

    Each `reason_*` function returns None, or a reason in a few words: `reason_missing()` why it can't run in
    this process, `reason_unsupported(*args, **kwargs)` why it can't serve a call, and `reason_named_only()`
    why it should run only if named. The last is not called for a named implementation. `forward` takes the
    op's own arguments.
    """

    name: str
    forward: Callable[..., Any]
    reason_missing: Callable[[], str | None] = _return_none
    reason_unsupported: Callable[..., str | None] = _return_none
    reason_named_only: Callable[[], str | None] = _return_none


@dataclass(frozen=True)
class Choice:
    """A choice of `OpTable.choose`: the op and the name of its implementation.

    requested_by: "impl" or "ADMFAST_IMPL" if it named the implementation, else None. skip_reasons: the
    implementations earlier in the order, each with the reason why it was skipped.
    """

    op: str
    name: str
    requested_by: str | None = None
    skip_reasons: dict[str, str] = field(default_factory=dict)


@dataclass
class OpTable:
    """The implementations of one op in order of preference; `reference` is always the last.

    `prefer(*args, **kwargs)` may return the name of the implementation that was measured to be the fastest
    for this call. It is tried before the others.
    """

    op: str
    implementations: list[Implementation] = field(default_factory=list)
    prefer: Callable[..., str | None] = _return_none

    def __post_init__(self) -> None:
        TABLES[self.op] = self

    def names(self) -> list[str]:
        """Return the names of all implementations, in order."""
        return [entry.name for entry in self.implementations]

    def find(self, name: str, requested_by: str = "impl", setting: str | None = None) -> Implementation:
        """Return the entry called `name`; raises InvalidArgument with the known names.

        requested_by: the argument or variable that names it, and setting: its whole value, for the error
        message; None: the name itself.
        """
        for entry in self.implementations:
            if entry.name == name:
                return entry
        setting = name if setting is None else setting
        if not isinstance(name, str):
            raise invalid(requested_by, name, f"the name of an implementation: {', '.join(self.names())}")
        suggestion = allowed_names(name, self.names())
        allowed = f"no implementation of {self.op} is called {name!r}; {suggestion}"
        raise invalid(requested_by, setting, allowed)

    def choose(self, impl: str | None, *args: Any, **kwargs: Any) -> Implementation:
        """Return the implementation that serves this call.

        Raises InvalidArgument for an unknown name, and Unavailable for a named implementation that can't
        serve the call, or if none can.
        """
        requested_by, setting = "impl", impl
        if impl is None:
            setting = impl_setting()
            impl, requested_by = impl_from_setting(self.op, setting), IMPL_VARIABLE
        if impl is not None:
            entry = self.find(impl, requested_by, setting)
            reason = entry.reason_missing() or entry.reason_unsupported(*args, **kwargs)
            if reason:
                raise Unavailable(f"{requested_by}={setting!r}: {self.op} can't run on it here: {reason}")
            if choices_are_recorded():
                report_choice(Choice(self.op, entry.name, requested_by))
            return entry
        reasons: dict[str, str] = {}
        for entry in self._preferred_first(self.prefer(*args, **kwargs)):
            reason = (
                entry.reason_missing()
                or entry.reason_named_only()
                or entry.reason_unsupported(*args, **kwargs)
            )
            if reason is None:
                if choices_are_recorded():
                    report_choice(Choice(self.op, entry.name, skip_reasons=reasons))
                return entry
            reasons[entry.name] = reason
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise Unavailable(f"{self.op}: no implementation serves this call ({listed})")

    def _preferred_first(self, preferred: str | None) -> list[Implementation]:
        """Return the entries, with the one called `preferred` moved to the front."""
        if preferred is None:
            return self.implementations
        return [self.find(preferred), *(entry for entry in self.implementations if entry.name != preferred)]


@contextlib.contextmanager
def override_impl(setting: str) -> Iterator[None]:
    """Choose within the block as if ADMFAST_IMPL were `setting`, in all threads of the process."""
    global _override
    before, _override = _override, setting
    try:
        yield
    finally:
        _override = before


_override: str | None = None
TABLES: dict[str, OpTable] = {}
_recorders: list[_Recorder] = []


@dataclass(eq=False)
class _Recorder:
    """The choices recorded in one thread."""

    thread: int
    choices: list[Choice]


@contextlib.contextmanager
def record_choices() -> Iterator[list[Choice]]:
    """Record the choices that this thread makes within the block, except those traced by torch.compile."""
    recorder = _Recorder(threading.get_ident(), [])
    _recorders.append(recorder)
    try:
        yield recorder.choices
    finally:
        _recorders.remove(recorder)


def choices_are_recorded() -> bool:
    """Tell whether any thread records choices."""
    # If a trace read the list of recorders, Dynamo would guard on it and recompile when it changes.
    return not torch.compiler.is_compiling() and bool(_recorders)


def report_choice(choice: Choice) -> None:
    """Report a choice to the recorders of this thread. A choice that is cached is reported at every call."""
    thread = threading.get_ident()
    for recorder in tuple(_recorders):  # a copy: another thread may start or stop recording meanwhile
        if recorder.thread == thread:
            recorder.choices.append(choice)


def impl_setting() -> str:
    """Return the value of ADMFAST_IMPL, or the value that `override_impl` set instead."""
    return os.environ.get(IMPL_VARIABLE, "") if _override is None else _override


def impl_from_setting(op: str, setting: str | None = None) -> str | None:
    """Return the name that ADMFAST_IMPL (or `setting` instead of it) gives for this op, or None.

    Raises InvalidArgument if the setting contains an unknown op, or two names for the same op.
    """
    setting = impl_setting() if setting is None else setting
    if not setting:
        return None
    names: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in setting.split(","))):
        target_op, separator, name = (part.strip() for part in item.partition("="))
        if not separator:
            target_op, name = "", item
        elif target_op not in TABLES:
            suggestion = allowed_names(target_op, TABLES)
            raise invalid(IMPL_VARIABLE, setting, f"no op is called {target_op!r}; {suggestion}")
        if target_op in names:
            kind = f"implementations of {target_op}" if target_op else "names for every op"
            raise invalid(IMPL_VARIABLE, setting, f"two {kind}: {names[target_op]!r} and {name!r}")
        names[target_op] = name
    return names.get(op, names.get(""))
