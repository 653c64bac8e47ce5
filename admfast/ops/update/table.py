"""The table of a solver: the rows of its updates, and the factor of the noise that it starts from."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from admfast.errors import InvalidArgument
from admfast.ops.update.step import PackedTable, Row, pack


@dataclass(frozen=True)
class SolverTable:
    """The rows of a solver for one schedule.

    rows: in the order in which they run. noise_scale: factor of the starting noise, x_T = noise_scale * z.
    integer_t: the network sees whole timesteps (int64): all are whole, and the schedule is not rescaled.
    """

    solver: str
    rows: tuple[Row, ...]
    noise_scale: float = 1.0
    integer_t: bool = True

    def __post_init__(self) -> None:
        for i, row in enumerate(self.rows):
            for field in dataclasses.fields(row):
                value = getattr(row, field.name) or 0.0  # None, for the timestep of the step
                # Only l0 may be -inf, for a variance of zero.
                if math.isnan(value) or (math.isinf(value) and field.name != "l0"):
                    raise InvalidArgument(
                        f"{self.solver}: row {i} (step {row.index}) has {field.name}={value}: "
                        "alpha_bar is 0 there; keep fewer steps or take another schedule"
                    )

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def timesteps(self) -> Tensor:
        """The timesteps that the network (first) and the guidance (second) see: [2, rows], float64."""
        return torch.tensor(
            [(row.t_net, row.t_clf) for row in self.rows], dtype=torch.float64, device="cpu"
        ).T

    def timesteps_for(self, x: Tensor) -> Tensor:
        """Return `timesteps` for every image of x: [2, rows, N], int64 or float32, on the device of x."""
        dtype = torch.int64 if self.integer_t else torch.float32
        return self.timesteps.to(dtype).to(x.device)[:, :, None].expand(2, len(self), len(x))

    @functools.cached_property
    def packed(self) -> PackedTable:
        """The rows as the update reads them, on the host."""
        return pack(self.rows)
