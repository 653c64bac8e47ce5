"""The update that all linear solvers share: one row of coefficients applied to the state.

With `out` the mean part of the network's output, `v` its variance channels, `g` the guidance gradient and `z`
noise, a row computes

    o = out + mix * (out - out2)          (out2: the mean part of a second output; mix = 0 without one)
    x0 = clip(k_x x + k_out o + k_pre g) + k_post g
    log_var = l0 + l1 v,  sigma = exp(log_var / 2)
    x_next = a x + a_s s + b x0 + c1 h1 + c2 h2 + c3 h3 + k_mean sigma^2 g + k_z sigma z

where s is a saved point and h1, h2, h3 are the last three values that were pushed, newest first. If the row
has `save`, the x from before the update becomes the saved point. If p_x or p_0 isn't 0, the row pushes
`p_x x + p_0 x0`, with the x from before the update and the reported x0: x0 itself, or the noise eps. A linear
solver, with its guidance and noise, is a table of such rows (see `admfast.solvers`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from admfast import checks
from admfast.errors import invalid
from admfast.ops import native
from admfast.ops.dispatch import Implementation, OpTable
from admfast.ops.update.noise import Stream, check_counter, normal_ref

HISTORY = 3


class Clip(IntEnum):
    """Ways to limit x0 to [-1, 1]."""

    NONE = 0
    USED = 1  # both the x0 in the update and the reported x0
    REPORTED = 2  # only the reported (and pushed) x0, as in the published previous-x update


@dataclass(frozen=True)
class Row:
    """One row of a solver's table; the names are those of the formula at the top of this module.

    `t_net` and `t_clf` are the timesteps that the network and the guidance see. `index` is the step's index
    in the respaced schedule, for reports. `timestep` is that of the original process; None is the step's own.
    """

    t_net: float
    t_clf: float
    k_x: float = 0.0
    k_out: float = 0.0
    k_pre: float = 0.0
    k_post: float = 0.0
    l0: float = 0.0
    l1: float = 0.0
    a: float = 0.0
    a_s: float = 0.0
    b: float = 0.0
    c1: float = 0.0
    c2: float = 0.0
    c3: float = 0.0
    k_mean: float = 0.0
    k_z: float = 0.0
    mix: float = 0.0
    clip: Clip = Clip.USED
    save: bool = False
    p_x: float = 0.0
    p_0: float = 0.0
    index: int = 0
    timestep: float | None = None

    @property
    def pushes(self) -> bool:
        """Tell whether the row pushes a value."""
        return bool(self.p_x or self.p_0)


# Columns of the packed table, in order. History is a ring buffer, and `pack` turns the ages of c1, c2, c3
# into its slots d0, d1, d2, so that nothing moves in memory. `push_slot` is -1 if the row doesn't push.
COLUMNS = (
    "k_x", "k_out", "k_pre", "k_post", "l0", "l1", "a", "a_s", "b", "d0", "d1", "d2", "k_mean", "k_z", "mix",
    "clip", "save", "p_x", "p_0", "push_slot",
)  # fmt: skip


@dataclass(frozen=True)
class PackedTable:
    """The rows of a solver as tensors: `host` in float64, `device` a copy, rounded once and uploaded once."""

    host: Tensor  # [rows, len(COLUMNS)] float64 on the CPU
    device: Tensor  # [rows, len(COLUMNS)] in the state's dtype, on its device

    def __len__(self) -> int:
        return self.host.shape[0]

    @functools.cached_property
    def used_columns(self) -> tuple[frozenset[str], ...]:
        """The columns that each row uses: those that aren't 0, and push_slot if the row pushes."""
        unused_row = torch.zeros(len(COLUMNS), dtype=torch.float64, device="cpu")
        unused_row[COLUMNS.index("push_slot")] = -1
        return tuple(
            frozenset(name for name, is_used in zip(COLUMNS, row, strict=True) if is_used)
            for row in (self.host != unused_row).tolist()
        )


def pack(
    rows: Sequence[Row], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> PackedTable:
    """Turn rows into the table that the update reads; this is the only upload of a solver's coefficients.

    Raises: InvalidArgument for a row that uses an older value than were pushed before it.
    """
    table = torch.zeros(len(rows), len(COLUMNS), dtype=torch.float64, device="cpu")
    pushed = 0
    for i, row in enumerate(rows):
        values = dataclasses.asdict(row)
        for age, coefficient in enumerate((row.c1, row.c2, row.c3), start=1):
            if coefficient and age > pushed:
                raise invalid(
                    f"rows[{i}].c{age}", coefficient, f"0: only {pushed} values were pushed before this row"
                )
            if age <= min(pushed, HISTORY):
                values[f"d{(pushed - age) % HISTORY}"] = coefficient
        values["push_slot"] = pushed % HISTORY if row.pushes else -1
        pushed += row.pushes
        row_values = [float(values.get(name, 0.0)) for name in COLUMNS]
        table[i] = torch.tensor(row_values, dtype=torch.float64, device="cpu")
    return PackedTable(table, table.to(device=device, dtype=dtype))


@dataclass
class SamplerState:
    """The tensors that a solver carries from row to row.

    x: [N, C, *spatial], contiguous, float32 (float64 with the reference). x0: like x, the last reported x0.
    saved: like x, for tables that save. history: [3, N, C, *spatial], for tables that push.
    """

    x: Tensor
    x0: Tensor
    saved: Tensor | None = None
    history: Tensor | None = None

    @classmethod
    def start(cls, x: Tensor, rows: Sequence[Row]) -> SamplerState:
        """Return a state that begins at a copy of `x`, with the buffers that the rows use."""
        x = x.detach().clone(memory_format=torch.contiguous_format)
        saved = torch.zeros_like(x) if any(row.save or row.a_s for row in rows) else None
        history = x.new_zeros((HISTORY, *x.shape)) if any(row.pushes for row in rows) else None
        return cls(x, torch.zeros_like(x), saved, history)


def sampler_step_ref(
    state: SamplerState,
    out: Tensor,
    table: PackedTable,
    row: int | Tensor,
    *,
    out2: Tensor | None = None,
    grad: Tensor | None = None,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    noise_row: int | Tensor | None = None,
    stream: int = Stream.STEPS,
) -> None:
    """Compute `sampler_step` in plain PyTorch, in the dtype of `state.x`."""
    x, channels = state.x, state.x.shape[1]
    if not 0 <= int(row) < len(table):
        raise invalid("row", int(row), f"0 to {len(table) - 1}")
    k = dict(zip(COLUMNS, table.host[int(row)].tolist(), strict=True))
    o = out.to(x.dtype)
    mean_part = o[:, :channels]
    if out2 is not None and k["mix"]:
        mean_part = mean_part + k["mix"] * (mean_part - out2[:, :channels].to(x.dtype))
    g = None if grad is None else grad.to(x.dtype)
    x0 = k["k_x"] * x + k["k_out"] * mean_part
    if g is not None and k["k_pre"]:
        x0 = x0 + k["k_pre"] * g
    reported = x0.clamp(-1, 1) if k["clip"] else x0
    x0 = reported if k["clip"] == Clip.USED else x0
    if g is not None and k["k_post"]:
        x0, reported = x0 + k["k_post"] * g, reported + k["k_post"] * g
    x_next = k["a"] * x + k["b"] * x0
    if k["a_s"]:
        assert state.saved is not None
        x_next = x_next + k["a_s"] * state.saved
    for slot in range(HISTORY):
        if k[f"d{slot}"]:
            assert state.history is not None
            x_next = x_next + k[f"d{slot}"] * state.history[slot]
    if k["k_mean"] or k["k_z"]:
        # l0 is -inf if the variance is zero, and exp turns it into 0.
        log_var = k["l0"] + k["l1"] * o[:, channels:] if k["l1"] else torch.full_like(x, k["l0"])
        if g is not None and k["k_mean"]:
            x_next = x_next + k["k_mean"] * torch.exp(log_var) * g
        if k["k_z"]:
            if noise is None:
                assert seeds is not None
                noise = normal_ref(seeds, tuple(x.shape[1:]), row if noise_row is None else noise_row, stream)
            x_next = x_next + k["k_z"] * torch.exp(0.5 * log_var) * noise.to(x.dtype)
    if k["save"]:
        assert state.saved is not None
        state.saved.copy_(x)
    if k["push_slot"] >= 0:
        assert state.history is not None
        pushed = k["p_0"] * reported if k["p_0"] else torch.zeros_like(x)
        state.history[int(k["push_slot"])].copy_(pushed + k["p_x"] * x if k["p_x"] else pushed)
    state.x.copy_(x_next)
    state.x0.copy_(reported)


def sampler_step(
    state: SamplerState,
    out: Tensor,
    table: PackedTable,
    row: int | Tensor,
    *,
    out2: Tensor | None = None,
    grad: Tensor | None = None,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    noise_row: int | Tensor | None = None,
    stream: int = Stream.STEPS,
    impl: str | None = None,
) -> None:
    """Advance `state` by row `row` of `table`, in place, by the formula at the top of this module.

    Args:
        state: x, x0 and, if the table uses them, saved point and history; written in place.
        out: the network's output [N, C or 2C, *spatial], any strides, float16, bfloat16 or float32 (float64
            with the reference); 2C channels if the row reads a variance (l1).
        table: `pack(rows, device, dtype)` for the device and dtype of x.
        row: index of the row, an int or an integer tensor of one element on the device of x. The compiled ops
            read the tensor on its device, so a captured graph advances to the next row by adding one to it
            after the update (`row.add_(1)`). The reference copies it to the host.
        out2: a second output, like `out`, of another network or for another class. Its variance is not used.
        grad: guidance gradient [N, C, *spatial], without loss scaling; None: no guidance.
        seeds: [N] int64 (see `as_seeds`), from which noise is made as `admfast.ops.update.noise` defines; a
            row without noise needs none.
        noise: [N, C, *spatial], used instead of noise from seeds.
        noise_row: row counter of the noise; None: `row`.
        stream: stream of the noise (see `Stream`).
        impl: name of an implementation (see `admfast info`); None: chosen automatically.

    Raises:
        InvalidArgument: for shapes, dtypes or devices that don't fit, for missing noise, saved point or
            history that the row needs, and for a row outside the table. A row in a GPU's memory, or under
            torch.compile, is not read here: everything that any row of the table needs must then be given.
            If such a row is outside the table, a GPU sets x and x0 to NaN, and a CPU raises when it runs.
        Unavailable: for a named implementation that can't serve the call.

    Computes in the dtype of `state.x`. Not differentiable; `pipe.predict` is.
    """
    used_columns = _check_row(state, table, row)
    _check_state(state, used_columns)
    _check_inputs(state.x, used_columns, out, out2=out2, grad=grad, seeds=seeds, noise=noise)
    if noise_row is not None:
        check_counter("noise_row", noise_row, state.x.device)
    checks.whole_number("stream", stream, 0, allow_tensor=False)
    check_counter("stream", stream, state.x.device)
    options: dict[str, Any] = dict(
        out2=out2, grad=grad, seeds=seeds, noise=noise, noise_row=noise_row, stream=int(stream)
    )
    entry = TABLE.choose(impl, state, out, table, row, **options)
    with torch.no_grad():
        entry.forward(state, out, table, row, **options)


def choose_update(state: SamplerState, table: PackedTable, impl: str | None = None) -> Callable[..., None]:
    """Return the implementation that runs rows of `table` on `state`, chosen once, without further checks.

    It is for a caller that goes through a table of its own, with the row in a tensor. The returned
    update(state, out, table, row, *, out2, grad, seeds, noise, noise_row, stream) does the same as
    `sampler_step`, for an `out` in float16, bfloat16 or float32.

    Raises: Unavailable for a named implementation that can't serve the state.
    """
    row = torch.zeros(1, dtype=torch.int32, device=state.x.device)
    return TABLE.choose(impl, state, state.x, table, row).forward


def _check_row(state: SamplerState, table: PackedTable, row: int | Tensor) -> frozenset[str]:
    """Reject a wrong table or row; return the columns used by the row (by any row, if it isn't read here)."""
    x = state.x
    if not isinstance(table, PackedTable):
        raise invalid("table", table, "a PackedTable, as `pack(rows, device, dtype)` returns it")
    if (table.device.dtype, table.device.device) != (x.dtype, x.device):
        actual = (table.device.dtype, str(table.device.device))
        raise invalid("table", actual, f"packed for the state's {x.dtype} on {x.device}")
    index: int | None = None
    if not isinstance(row, Tensor):
        try:
            index = operator.index(row)
        except TypeError:
            raise invalid("row", row, "an integer, or an integer tensor of one element") from None
    elif row.numel() != 1 or row.dtype not in (torch.int32, torch.int64) or row.device != x.device:
        raise invalid("row", (tuple(row.shape), row.dtype, str(row.device)), f"one integer on {x.device}")
    elif row.device.type == "cpu" and not torch.compiler.is_compiling():
        index = int(row)
    if index is not None and not 0 <= index < len(table):
        raise invalid("row", index, f"0 to {len(table) - 1}")
    return frozenset().union(*table.used_columns) if index is None else table.used_columns[index]


def _check_state(state: SamplerState, used_columns: frozenset[str]) -> None:
    """Reject buffers that are missing or not like x."""
    x = state.x
    if x.dim() < 3 or not x.is_contiguous():
        raise invalid("state.x", tuple(x.shape), "a contiguous [N, C, *spatial]")
    if x.dtype not in (torch.float32, torch.float64):
        raise invalid("state.x.dtype", x.dtype, "float32, or float64 with the reference")
    if state.saved is None and used_columns & {"a_s", "save"}:
        raise invalid("state.saved", None, "a buffer like x: the row uses a saved point")
    if state.history is None and used_columns & {"d0", "d1", "d2", "push_slot"}:
        raise invalid("state.history", None, f"a buffer [{HISTORY}, *x.shape]: the row uses history")
    shape = tuple(x.shape)
    buffers = (
        (state.x0, "x0", shape),
        (state.saved, "saved", shape),
        (state.history, "history", (HISTORY, *shape)),
    )
    for buffer, name, expected_shape in buffers:
        if buffer is None:
            continue
        if (tuple(buffer.shape), buffer.dtype, buffer.device) != (expected_shape, x.dtype, x.device):
            actual = (tuple(buffer.shape), buffer.dtype, str(buffer.device))
            raise invalid(f"state.{name}", actual, f"{expected_shape}, {x.dtype} on {x.device}")
        if not buffer.is_contiguous():
            raise invalid(f"state.{name}", buffer.stride(), "contiguous")
    _check_no_overlap({"x": x, **{name: buffer for buffer, name, _ in buffers if buffer is not None}})


def _check_no_overlap(buffers: dict[str, Tensor]) -> None:
    """Reject buffers that overlap: one would be written before another is read."""
    if torch.compiler.is_compiling() or any(type(t) is not Tensor or t.is_meta for t in buffers.values()):
        return  # these tensors have no addresses
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes, name) for name, t in buffers.items() if t.numel())
    for (_, end, name), (begin, _, other) in itertools.pairwise(spans):
        if begin < end:
            raise invalid(f"state.{other}", f"memory of state.{name}", "memory of its own")


def _check_inputs(x: Tensor, used_columns: frozenset[str], out: Tensor, **options: Tensor | None) -> None:
    """Reject inputs that don't fit x or the row, without reading anything back from a device."""
    out2, grad, seeds, noise = (options[name] for name in ("out2", "grad", "seeds", "noise"))
    for name, given in (("out", out), ("out2", out2), ("grad", grad), ("noise", noise)):
        if name == "out" or given is not None:
            checks.float_tensor(name, given, x.device)
    if seeds is not None and not isinstance(seeds, Tensor):
        raise invalid("seeds", seeds, "an int64 tensor (see as_seeds)")
    n, channels, *spatial = x.shape
    allowed = (
        [(n, 2 * channels, *spatial)]
        if "l1" in used_columns
        else [(n, k * channels, *spatial) for k in (1, 2)]
    )
    if tuple(out.shape) not in allowed:
        raise invalid("out.shape", tuple(out.shape), " or ".join(map(str, allowed)))
    if out2 is not None and (out2.shape, out2.dtype) != (out.shape, out.dtype):
        like = f"{tuple(out.shape)} and {out.dtype}, like out"
        raise invalid("out2", (tuple(out2.shape), out2.dtype), like)
    for name, value in (("grad", grad), ("noise", noise)):
        if value is not None and value.shape != x.shape:
            raise invalid(f"{name}.shape", tuple(value.shape), f"{tuple(x.shape)}")
    if seeds is None:
        if noise is None and "k_z" in used_columns:
            raise invalid("seeds", None, f"int64 [{n}], or give noise: the row uses noise")
    elif tuple(seeds.shape) != (n,) or seeds.dtype != torch.int64:
        raise invalid("seeds", (tuple(seeds.shape), seeds.dtype), f"int64 [{n}]")
    elif seeds.device != x.device:
        raise invalid("seeds.device", str(seeds.device), f"{x.device}, where the state is")


def _unsupported_for(device: str) -> Callable[..., str | None]:
    """Return the function that says why a compiled implementation for `device` can't serve a call."""

    def unsupported(
        state: SamplerState, out: Tensor, table: PackedTable, row: int | Tensor, **options: Any
    ) -> str | None:
        if state.x.device.type != device:
            return f"x is on {state.x.device.type}"
        if state.x.dtype != torch.float32:
            return f"x is {state.x.dtype}; float32"
        if out.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"out is {out.dtype}"
        return None

    return unsupported


def _native(state: SamplerState, out: Tensor, table: PackedTable, row: int | Tensor, **options: Any) -> None:
    noise_row, seeds = options["noise_row"], options["seeds"]
    noise_row = row if noise_row is None else noise_row
    (row_tensor, row_offset), (noise_tensor, noise_offset) = (
        _tensor_and_offset(row),
        _tensor_and_offset(noise_row),
    )
    native.ops().sampler_step_(
        state.x, state.x0, state.saved, state.history, out, options["out2"], options["grad"],
        None if seeds is None else seeds.contiguous(), options["noise"], table.device, row_tensor,
        noise_tensor, row_offset, noise_offset, options["stream"],
    )  # fmt: skip
    if not torch.compiler.is_compiling():  # a trace knows from the op's schema which tensors are written
        # The op doesn't raise version counters. Without this, autograd would not notice a backward through
        # the old state.
        written = (state.x, state.x0, state.saved, state.history)
        torch.autograd.graph.increment_version([t for t in written if t is not None and not t.is_inference()])


@native.fake("sampler_step_")
def _fake(*_args: Any) -> None:
    """Return nothing: the op writes in place."""


def _tensor_and_offset(value: int | Tensor) -> tuple[Tensor | None, int]:
    """Return a counter as the compiled op takes it: a tensor that it reads when it runs, and an offset."""
    return (value, 0) if isinstance(value, Tensor) else (None, operator.index(value))


TABLE = OpTable(
    "sampler_step",
    [
        Implementation("cuda", _native, native.reason_missing_cuda, _unsupported_for("cuda")),
        Implementation("cpp", _native, native.reason_missing, _unsupported_for("cpu")),
        Implementation("reference", sampler_step_ref),
    ],
)
