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
from admfast.solvers.deis_rows import deis as deis
from admfast.solvers.deis_rows import ipndm as ipndm
from admfast.solvers.dpmpp_rows import dpmpp as dpmpp
from admfast.solvers.heun_rows import euler as euler
from admfast.solvers.heun_rows import heun as heun
from admfast.solvers.solver import SOLVERS, Solver
from admfast.solvers.unipc_rows import unipc as unipc


def solver_options(name: str) -> dict[str, Any]:
    """Return the options of a solver with their defaults."""
    return {p.name: p.default for p in inspect.signature(SOLVERS[name]).parameters.values()}


def list_solvers(starts_from: str | None = None) -> list[str]:
    """Return every solver as text with all its options, such as "ddim:eta=0.0".

    starts_from: "noise" or "image" selects the solvers that start from it; None selects all.
    """
    solvers = [factory() for factory in SOLVERS.values()]
    return [str(solver) for solver in solvers if starts_from in (None, solver.starts_from)]


def make_solver(value: Solver | str, **options: Any) -> Solver:
    """Return a Solver, given one or a text (a name, or a name with options). `options` replace its options.

    Raises: InvalidArgument for an unknown solver or option, or a value that the solver refuses.
    """
    if isinstance(value, str):
        value = parse_solver(value)
    if not isinstance(value, Solver):
        raise invalid("solver", value, f"a Solver, or one of: {', '.join(list_solvers())}")
    return _make_from_options(value.name, {**value.options, **options}) if options else value


@functools.lru_cache
def parse_solver(text: str) -> Solver:
    """Return the solver that a text such as "ddim:eta=0.5" names; cached."""
    name, _, options_text = (part.strip() for part in text.partition(":"))
    if name not in SOLVERS:
        raise invalid(
            "solver", text, f"{allowed_names(name, SOLVERS)} (with options: {', '.join(list_solvers())})"
        )
    options: dict[str, Any] = {}
    # A comma inside a value, such as a list, is not followed by NAME=.
    for assignment in filter(None, re.split(r",(?=\s*\w+\s*=)", options_text)):
        option, separator, value = (word.strip() for word in assignment.partition("="))
        if not separator or option in options:
            raise invalid("solver", text, f"options as NAME=VALUE, each once, such as {ddim()}")
        options[option] = parse_literal(value)
    return _make_from_options(name, options)


def _make_from_options(name: str, options: dict[str, Any]) -> Solver:
    allowed = solver_options(name)
    for option, value in options.items():
        if option not in allowed:
            hint = allowed_names(option, allowed) if allowed else "it has none"
            raise invalid(option, value, f"the solver {name} has no such option; {hint}")
    return SOLVERS[name](**options)
