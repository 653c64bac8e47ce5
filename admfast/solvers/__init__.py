"""Floor 3: solvers as tables. A new solver is a pure function from a process to a `SolverTable`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from admfast.checks import one_of
from admfast.diffusion import GaussianDiffusion
from admfast.errors import invalid, nearest
from admfast.solvers.ddim import ddim, ddim_inverse
from admfast.solvers.ddpm import ddpm
from admfast.solvers.table import SolverTable

SOLVERS: dict[str, Callable[..., SolverTable]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "ddim-inverse": ddim_inverse,
}
# The published respacing strings of a number of steps: DDIM keeps an integer stride from step 0.
RESPACING = {"ddpm": "{steps}", "ddim": "ddim{steps}", "ddim-inverse": "ddim{steps}"}


def check_solver(name: str) -> None:
    """Raise InvalidArgument for a solver that isn't known, with the nearest names."""
    one_of("solver", name, SOLVERS)


def make_table(solver: str, diffusion: GaussianDiffusion, **options: Any) -> SolverTable:
    """Return the table of `solver` on the (respaced) process; `options` are that solver's own.

    Raises: InvalidArgument for an unknown solver, option or value.
    """
    check_solver(solver)
    function = SOLVERS[solver]
    known = function.__kwdefaults__ or {}
    for name, value in options.items():
        if name not in known:
            raise invalid(name, value, f"the solver {solver} has no such option; {nearest(name, known)}")
    return function(diffusion, **options)


def respacing_of(solver: str, steps: int) -> str:
    """The respacing string with which `solver` is published for a number of steps."""
    check_solver(solver)
    return RESPACING[solver].format(steps=steps)


__all__ = [
    "SOLVERS",
    "SolverTable",
    "check_solver",
    "ddim",
    "ddim_inverse",
    "ddpm",
    "make_table",
    "respacing_of",
]
