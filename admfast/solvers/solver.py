"""A solver as a value: its name, its options, and the function that makes its table for a process."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from admfast.diffusion import GaussianDiffusion, MeanType
from admfast.ops.update import Clip, SolverTable

SOLVERS: dict[str, Callable[..., Solver]] = {}
SolverFactory = TypeVar("SolverFactory", bound="Callable[..., Solver]")


def register(factory: SolverFactory) -> SolverFactory:
    """Add a function that makes a solver to `SOLVERS`, under its name with dashes for underscores."""
    SOLVERS[factory.__name__.replace("_", "-")] = factory
    return factory


@dataclass(frozen=True)
class Solver:
    """A method that turns noise into images, or images into noise.

    Attributes:
        name: its name in `SOLVERS`.
        make_table: make_table(process, clip=..., **options) -> `SolverTable`, a pure function. The process is
            already respaced; clip=True clips x_0 to [-1, 1].
        options: its own options, by name.
        starts_from: "noise", or "image" for a solver that turns clean images into noise.
        respacing: the published respacing for a number of steps, as a template with "{steps}".
    """

    name: str
    make_table: Callable[..., SolverTable] = field(repr=False)
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    starts_from: Literal["noise", "image"] = "noise"
    respacing: str = "{steps}"

    def __post_init__(self) -> None:
        # A solver may be shared (`parse_solver` caches it), so its options must not change.
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))

    def __reduce__(self) -> tuple[Any, ...]:
        return Solver, (self.name, self.make_table, dict(self.options), self.starts_from, self.respacing)

    def __str__(self) -> str:
        """Write the text that `make_solver` reads: "ddim:eta=0.5"."""
        options = ",".join(f"{name}={json.dumps(value)}" for name, value in self.options.items())
        return f"{self.name}:{options}" if options else self.name

    def table(self, process: GaussianDiffusion, clip: bool = True) -> SolverTable:
        """Return the table for a process, already respaced. clip: clip x_0 to [-1, 1] in every row."""
        return self.make_table(process, clip=clip, **self.options)

    def respacing_for(self, steps: int) -> str:
        """Return the published respacing of the solver for a number of steps."""
        return self.respacing.format(steps=steps)


def choose_clip(process: GaussianDiffusion, clip: bool, network_mean: bool) -> Clip:
    """Return the way in which a row clips x_0.

    network_mean: the update uses the mean that a PREVIOUS_X network predicts, so only the reported x_0 is
    clipped for such a network.
    """
    if not clip:
        return Clip.NONE
    return Clip.REPORTED if network_mean and process.mean_type is MeanType.PREVIOUS_X else Clip.USED
