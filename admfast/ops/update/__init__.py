"""The update that all solvers share: one row of a table at a time (`step.py`, `table.py`), and its noise."""

from admfast.ops.update.noise import MASK32, Stream, as_seeds, normal, normal_ref, philox4x32_10
from admfast.ops.update.step import (
    COLUMNS,
    HISTORY,
    Clip,
    PackedTable,
    Row,
    SamplerState,
    choose_update,
    pack,
    sampler_step,
    sampler_step_ref,
)
from admfast.ops.update.table import SolverTable

__all__ = [
    "COLUMNS",
    "HISTORY",
    "MASK32",
    "Clip",
    "PackedTable",
    "Row",
    "SamplerState",
    "SolverTable",
    "Stream",
    "as_seeds",
    "normal",
    "normal_ref",
    "pack",
    "philox4x32_10",
    "sampler_step",
    "sampler_step_ref",
    "choose_update",
]
