"""The table of a solver: rows of the one update, and the scale of the noise that they start from."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from admfast.errors import InvalidArgument, invalid
from admfast.ops.update.step import PackedTable, Row, pack


@dataclass(frozen=True)
class SolverTable:
    """A solver made concrete for one schedule.

    rows: in the order in which they run. scale: x_T = scale * z. integer_t: the network sees whole timesteps
    (int64), as where the schedule isn't rescaled.
    """

    solver: str
    rows: tuple[Row, ...]
    scale: float = 1.0
    integer_t: bool = True

    def __post_init__(self) -> None:
        for i, row in enumerate(self.rows):
            for field in dataclasses.fields(row):
                value = getattr(row, field.name)
                # l0 alone may be -inf: a variance of zero.
                if math.isnan(value) or (math.isinf(value) and field.name != "l0"):
                    raise InvalidArgument(
                        f"{self.solver}: row {i} (step {row.index}) has {field.name}={value}: "
                        "alpha_bar is 0 there; keep fewer steps or take another schedule"
                    )

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def timesteps(self) -> Tensor:
        """Return what network and guidance see of t: [2, rows], float64."""
        return torch.tensor(
            [(row.t_net, row.t_clf) for row in self.rows], dtype=torch.float64, device="cpu"
        ).T

    def seen(self, x: Tensor) -> Tensor:
        """Return what network and guidance see of t, for the images x: [2, rows, N] on its device."""
        dtype = torch.int64 if self.integer_t else torch.float32
        return self.timesteps.to(dtype).to(x.device)[:, :, None].expand(2, len(self), len(x))

    @functools.cached_property
    def packed(self) -> PackedTable:
        """Return the rows as the update reads them, on the host."""
        return pack(self.rows)

    def from_step(self, index: int) -> SolverTable:
        """Return the rows from the one whose step is `index` on (to begin from a noised image)."""
        for i, row in enumerate(self.rows):
            if row.index == index:
                return dataclasses.replace(self, rows=self.rows[i:])
        raise invalid("index", index, f"a step of the table: {[row.index for row in self.rows]}")
