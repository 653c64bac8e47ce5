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

ENVIRONMENT = "ADMFAST_IMPL"


def _always(*_args: Any, **_kwargs: Any) -> None:
    """Return None, "no objection": the default of the functions that may give a reason or a name."""
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to run an op.

    `available()` and `supports(*args, **kwargs)` return None, or in a few words the reason why it can't run.
    `unasked()` returns None, or the reason why it should run only if named; it is not called for a named
    implementation. `forward` takes the op's own arguments.
    """

    name: str
    forward: Callable[..., Any]
    available: Callable[[], str | None] = _always
    supports: Callable[..., str | None] = _always
    unasked: Callable[[], str | None] = _always


@dataclass(frozen=True)
class Choice:
    """A choice of `OpTable.choose`: the implementation, what named it, and why earlier ones were skipped."""

    op: str
    name: str
    asked_by: str | None = None
    passed_over: dict[str, str] = field(default_factory=dict)


@dataclass
class OpTable:
    """The implementations of one op in order of preference; `reference` is always the last.

    `prefer(*args, **kwargs)` may return the name of the implementation that was measured to be the fastest
    for this call. It is tried before the others.
    """

    op: str
    implementations: list[Implementation] = field(default_factory=list)
    prefer: Callable[..., str | None] = _always

    def __post_init__(self) -> None:
        TABLES[self.op] = self

    def names(self) -> list[str]:
        """Return the names of all implementations, in order."""
        return [entry.name for entry in self.implementations]

    def named(self, name: str, asked_by: str = "impl", value: str | None = None) -> Implementation:
        """Return the entry called `name`; raises InvalidArgument with the known names.

        `value` is the whole setting that contained the name, for the error message; None: the name itself.
        """
        for entry in self.implementations:
            if entry.name == name:
                return entry
        value = name if value is None else value
        if not isinstance(name, str):
            raise invalid(asked_by, name, f"the name of an implementation: {', '.join(self.names())}")
        near = allowed_names(name, self.names())
        raise invalid(asked_by, value, f"no implementation of {self.op} is called {name!r}; {near}")

    def choose(self, impl: str | None, *args: Any, **kwargs: Any) -> Implementation:
        """Return the implementation that serves this call.

        Raises InvalidArgument for an unknown name, and Unavailable for a named implementation that can't
        serve the call, or if none can.
        """
        asked_by, value = "impl", impl
        if impl is None:
            value = setting()
            impl, asked_by = named_by_environment(self.op, value), ENVIRONMENT
        if impl is not None:
            entry = self.named(impl, asked_by, value)
            reason = entry.available() or entry.supports(*args, **kwargs)
            if reason:
                raise Unavailable(f"{asked_by}={value!r}: {self.op} can't run on it here: {reason}")
            if watched():
                tell(Choice(self.op, entry.name, asked_by))
            return entry
        reasons: dict[str, str] = {}
        for entry in self._in_order(self.prefer(*args, **kwargs)):
            reason = entry.available() or entry.unasked() or entry.supports(*args, **kwargs)
            if reason is None:
                if watched():
                    tell(Choice(self.op, entry.name, passed_over=reasons))
                return entry
            reasons[entry.name] = reason
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise Unavailable(f"{self.op}: no implementation serves this call ({listed})")

    def _in_order(self, first: str | None) -> list[Implementation]:
        """Return the entries, with the one called `first` moved to the front."""
        if first is None:
            return self.implementations
        return [self.named(first), *(entry for entry in self.implementations if entry.name != first)]


@contextlib.contextmanager
def using(setting: str) -> Iterator[None]:
    """Choose within the block as if ADMFAST_IMPL were `setting`, in all threads of the process."""
    global _setting
    before, _setting = _setting, setting
    try:
        yield
    finally:
        _setting = before


_setting: str | None = None
TABLES: dict[str, OpTable] = {}
_watchers: list[_Watcher] = []


@dataclass(eq=False)
class _Watcher:
    """The choices collected by one thread."""

    thread: int
    seen: list[Choice]


@contextlib.contextmanager
def watch() -> Iterator[list[Choice]]:
    """Collect the choices that this thread makes within the block, except those traced by torch.compile."""
    watcher = _Watcher(threading.get_ident(), [])
    _watchers.append(watcher)
    try:
        yield watcher.seen
    finally:
        _watchers.remove(watcher)


def watched() -> bool:
    """Tell whether choices are being collected."""
    # If a trace read the list of watchers, Dynamo would guard on it and recompile while somebody watches.
    return not torch.compiler.is_compiling() and bool(_watchers)


def tell(choice: Choice) -> None:
    """Report a choice to the watchers of this thread. A choice that is cached is reported at every call."""
    own = threading.get_ident()
    for watcher in tuple(_watchers):  # a copy: another thread may start or stop watching meanwhile
        if watcher.thread == own:
            watcher.seen.append(choice)


def setting() -> str:
    """Return the value of ADMFAST_IMPL, or the value that `using` set instead."""
    return os.environ.get(ENVIRONMENT, "") if _setting is None else _setting


def named_by_environment(op: str, value: str | None = None) -> str | None:
    """Return the name that ADMFAST_IMPL (or `value` instead of it) gives for this op, or None.

    Raises InvalidArgument if the setting contains an unknown op, or two names for the same op.
    """
    value = setting() if value is None else value
    if not value:
        return None
    names: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in value.split(","))):
        target, separator, name = (part.strip() for part in item.partition("="))
        if not separator:
            target, name = "", item
        elif target not in TABLES:
            raise invalid(ENVIRONMENT, value, f"no op is called {target!r}; {allowed_names(target, TABLES)}")
        if target in names:
            what = f"implementations of {target}" if target else "names for every op"
            raise invalid(ENVIRONMENT, value, f"two {what}: {names[target]!r} and {name!r}")
        names[target] = name
    return names.get(op, names.get(""))
