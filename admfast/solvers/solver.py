"""A solver as a value: its name, its options, and the table that it makes of a process."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from admfast.diffusion import GaussianDiffusion, MeanType
from admfast.ops.update import Clip, SolverTable

SOLVERS: dict[str, Callable[..., Solver]] = {}
Make = TypeVar("Make", bound="Callable[..., Solver]")


def registered(make: Make) -> Make:
    """Enter the function that makes a solver into `SOLVERS`, under its name with dashes."""
    SOLVERS[make.__name__.replace("_", "-")] = make
    return make


@dataclass(frozen=True)
class Solver:
    """A way to take images from noise to data, or back.

    Attributes:
        name: its name in `SOLVERS`.
        rows_of: rows_of(process, clip=..., **options) -> `SolverTable`, a pure function. The process is
            respaced already; clip limits x_0 to [-1, 1].
        options: its own options, by name.
        begins: "noise", or "image" for one that takes clean images apart.
        respacing: the published respacing of a number of steps.
    """

    name: str
    rows_of: Callable[..., SolverTable] = field(repr=False)
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    begins: Literal["noise", "image"] = "noise"
    respacing: str = "{steps}"

    def __post_init__(self) -> None:
        # A value that is kept, as by `from_text`, must not change under those who share it.
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))

    def __reduce__(self) -> tuple[Any, ...]:
        return Solver, (self.name, self.rows_of, dict(self.options), self.begins, self.respacing)

    def __str__(self) -> str:
        """Write the text that `solver_of` reads: "ddim:eta=0.5"."""
        options = ",".join(f"{name}={json.dumps(value)}" for name, value in self.options.items())
        return f"{self.name}:{options}" if options else self.name

    def table(self, process: GaussianDiffusion, clip: bool = True) -> SolverTable:
        """Return the rows of a (respaced) process; `clip` limits x_0 to [-1, 1] at every row."""
        return self.rows_of(process, clip=clip, **self.options)

    def respaced(self, steps: int) -> str:
        """Return the respacing with which the solver is published for a number of steps."""
        return self.respacing.format(steps=steps)


def clip_of(process: GaussianDiffusion, clip: bool, network_mean: bool) -> Clip:
    """Return how a row limits x_0; with `network_mean` the update follows the network, not that x_0."""
    if not clip:
        return Clip.NONE
    return Clip.REPORTED if network_mean and process.mean_type is MeanType.PREVIOUS_X else Clip.USED
