"""A solver as a value: its name, its options, and the function that makes its table for a process."""

from __future__ import annotations

import dataclasses
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
        spacing: how it spaces the timesteps, if nothing else is asked for: a name of `SPACINGS`, "" for the
            published spacing of a count, or "ddim".
        evaluations: evaluations of the network in each of its steps but the last, which takes one.
    """

    name: str
    make_table: Callable[..., SolverTable] = field(repr=False)
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    starts_from: Literal["noise", "image"] = "noise"
    spacing: str = ""
    evaluations: int = 1

    def __post_init__(self) -> None:
        # A solver may be shared (`parse_solver` caches it), so its options must not change.
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))

    def __reduce__(self) -> tuple[Any, ...]:
        values = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        return Solver, tuple((values | {"options": dict(self.options)}).values())

    def __str__(self) -> str:
        """Write the text that `make_solver` reads: "ddim:eta=0.5"."""
        options = ",".join(f"{name}={json.dumps(value)}" for name, value in self.options.items())
        return f"{self.name}:{options}" if options else self.name

    def table(self, process: GaussianDiffusion, clip: bool = True) -> SolverTable:
        """Return the table for a process, already respaced. clip: clip x_0 to [-1, 1] in every row."""
        return self.make_table(process, clip=clip, **self.options)

    def respacing_for(self, steps: int, spacing: str | None = None) -> str:
        """Return the respacing that leads to at most `steps` rows: evaluations of the network.

        spacing: a name of `SPACINGS`; None takes the solver's own.
        """
        kept = -(-steps // self.evaluations)
        return f"{self.spacing if spacing is None else spacing}{kept}"


def row_inputs(process: GaussianDiffusion, i: int) -> dict[str, Any]:
    """Return the fields of a row that say what it reads at step i: timesteps, x_0 and the step's index."""
    k_x, k_out = process.x0_coefficients(i)
    timestep = float(process.schedule.model_t(i))
    return dict(t_net=timestep, t_clf=timestep, k_x=k_x, k_out=k_out, index=i)


def choose_clip(process: GaussianDiffusion, clip: bool, network_mean: bool) -> Clip:
    """Return the way in which a row clips x_0.

    network_mean: the update uses the mean that a PREVIOUS_X network predicts, so only the reported x_0 is
    clipped for such a network.
    """
    if not clip:
        return Clip.NONE
    return Clip.REPORTED if network_mean and process.mean_type is MeanType.PREVIOUS_X else Clip.USED
