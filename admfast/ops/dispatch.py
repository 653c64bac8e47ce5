"""Which implementation of an op runs: one ordered table per op, and one rule for choosing from it.

The rule: `impl=NAME`, else the environment variable ADMFAST_IMPL, else the first entry of the table that is
available, supports the call and may be chosen unasked. An implementation asked for by name that can't run
raises `Unavailable` with its reason; it never falls back silently.

ADMFAST_IMPL is a comma-separated list of `NAME` (every op) and `OP=NAME` (one op, which wins over `NAME`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from admfast.errors import Unavailable, invalid, nearest

ENVIRONMENT = "ADMFAST_IMPL"


def _always(*_args: Any, **_kwargs: Any) -> None:
    """No reason against: the default for `available` and `supports`."""
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to run an op.

    `available()` and `supports(*args, **kwargs)` return None, or the reason against in a few words; so does
    `unasked()`, which is heeded only where the implementation was not asked for by name.
    `forward` takes the op's own arguments; `backward` is None where autograd of `forward` serves.
    """

    name: str
    forward: Callable[..., Any]
    available: Callable[[], str | None] = _always
    supports: Callable[..., str | None] = _always
    backward: Callable[..., Any] | None = None
    unasked: Callable[[], str | None] = _always


@dataclass
class OpTable:
    """The implementations of one op in order of preference; `reference` is always the last."""

    op: str
    implementations: list[Implementation] = field(default_factory=list)

    def __post_init__(self) -> None:
        TABLES[self.op] = self

    def names(self) -> list[str]:
        return [entry.name for entry in self.implementations]

    def named(self, name: str, asked_by: str = "impl") -> Implementation:
        """Return the entry called `name`; raises InvalidArgument with the known names."""
        for entry in self.implementations:
            if entry.name == name:
                return entry
        raise invalid(
            asked_by, name, f"no implementation of {self.op} has that name; {nearest(name, self.names())}"
        )

    def choose(self, impl: str | None, *args: Any, **kwargs: Any) -> Implementation:
        """Return the implementation that serves this call.

        Raises InvalidArgument for an unknown name and Unavailable for one that can't serve the call.
        """
        asked_by = "impl"
        if impl is None:
            impl, asked_by = _from_environment(self.op), ENVIRONMENT
        if impl is not None:
            entry = self.named(impl, asked_by)
            reason = entry.available() or entry.supports(*args, **kwargs)
            if reason:
                raise Unavailable(f"{asked_by}={impl!r}: {self.op} can't run on it here: {reason}")
            return entry
        reasons = []
        for entry in self.implementations:
            reason = entry.available() or entry.unasked() or entry.supports(*args, **kwargs)
            if reason is None:
                return entry
            reasons.append(f"{entry.name}: {reason}")
        raise Unavailable(f"{self.op}: no implementation serves this call ({'; '.join(reasons)})")


TABLES: dict[str, OpTable] = {}


def _from_environment(op: str) -> str | None:
    """The name that ADMFAST_IMPL gives for this op, or None."""
    value = os.environ.get(ENVIRONMENT, "")
    chosen = None
    for item in filter(None, (part.strip() for part in value.split(","))):
        target, separator, name = (part.strip() for part in item.partition("="))
        if not separator:
            chosen = chosen or item
        elif target == op:
            return name
        elif target not in TABLES:
            raise invalid(ENVIRONMENT, value, f"no op is called {target!r}; {nearest(target, TABLES)}")
    return chosen
