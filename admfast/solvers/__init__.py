"""Floor 3: solvers. Each is made by a function with its name, `ddim(eta=0.5)`, or from text, "ddim:eta=0.5".

A solver's file is called `<name>_rows.py`, so that no module has the name of such a function.
"""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any

from admfast.checks import parse_literal
from admfast.errors import allowed_names, invalid
from admfast.solvers.ddim_rows import ddim as ddim
from admfast.solvers.ddim_rows import ddim_inverse as ddim_inverse
from admfast.solvers.ddpm_rows import ddpm as ddpm
from admfast.solvers.solver import SOLVERS, Solver


def options_of(name: str) -> dict[str, Any]:
    """Return the options of a solver with their defaults."""
    return {p.name: p.default for p in inspect.signature(SOLVERS[name]).parameters.values()}


def listed(begins: str | None = None) -> list[str]:
    """Return every solver as text with all its options, such as "ddim:eta=0.0".

    begins: "noise" or "image" selects the solvers that begin from it.
    """
    solvers = [make() for make in SOLVERS.values()]
    return [str(solver) for solver in solvers if begins in (None, solver.begins)]


def solver_of(value: Solver | str, **options: Any) -> Solver:
    """Return a Solver, given one or a text (a name, or a name with options). `options` replace its options.

    Raises: InvalidArgument for an unknown solver or option, or a value that the solver refuses.
    """
    if isinstance(value, str):
        value = from_text(value)
    if not isinstance(value, Solver):
        raise invalid("solver", value, f"a Solver, or one of: {', '.join(listed())}")
    return _made(value.name, {**value.options, **options}) if options else value


@functools.lru_cache
def from_text(text: str) -> Solver:
    """Return the solver that a text such as "ddim:eta=0.5" names; cached."""
    name, _, given = (part.strip() for part in text.partition(":"))
    if name not in SOLVERS:
        raise invalid("solver", text, f"{allowed_names(name, SOLVERS)} (solvers: {', '.join(listed())})")
    options: dict[str, Any] = {}
    # A comma inside a value, such as a list, is not followed by NAME=.
    for part in filter(None, re.split(r",(?=\s*\w+\s*=)", given)):
        option, separator, value = (word.strip() for word in part.partition("="))
        if not separator or option in options:
            raise invalid("solver", text, f"options as NAME=VALUE, each once, such as {ddim()}")
        options[option] = parse_literal(value)
    return _made(name, options)


def _made(name: str, options: dict[str, Any]) -> Solver:
    known = options_of(name)
    for option, value in options.items():
        if option not in known:
            has = allowed_names(option, known) if known else "it has none"
            raise invalid(option, value, f"the solver {name} has no such option; {has}")
    return SOLVERS[name](**options)
