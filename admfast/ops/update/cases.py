"""Cases of `sampler_step` and `normal`: an example, small cases in every layout, and real image sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from admfast.ops.cases import Case, Draw, OpCases
from admfast.ops.layout import channels_last
from admfast.ops.update.noise import Stream, as_seeds, normal
from admfast.ops.update.step import Clip, PackedTable, Row, SamplerState, pack, sampler_step

# PLAIN_ROWS is one row such as DDIM's. FULL_ROWS is a row that saves and pushes, followed by a row that uses
# everything at once (variance, guidance in all three places, noise, saved point, history and push).
PLAIN_ROWS = [Row(0.0, 0.0, k_x=1.0, k_out=-1.0, a=0.5, b=0.5)]
FULL_ROWS = [
    Row(0, 0, k_x=0.5, k_out=0.7, p_0=1, save=True, b=1),
    Row(
        0, 0, k_x=0.9, k_out=-0.4, k_pre=0.1, k_post=0.2, l0=-1, l1=0.5, a=0.3, a_s=0.1, b=0.6, c1=0.2,
        k_mean=0.3, k_z=0.7, mix=0.5, clip=Clip.USED, save=True, p_x=0.4, p_0=-1.3,
    ),
]  # fmt: skip
FULL_CASE: Case = dict(n=2, spatial=(4, 6), full=True)
SMALL = (
    FULL_CASE,
    FULL_CASE | dict(layout="channels_last"),
    FULL_CASE | dict(layout="channels_last", variance=False),
    FULL_CASE | dict(layout="channels_last", channels=1, spatial=(4, 10)),
    FULL_CASE | dict(layout="sliced", spatial=(5, 7)),
    FULL_CASE | dict(given_noise=True, counter=True),
    dict(n=2, spatial=(4, 5)),
)
REAL = {f"{side}x{side}": dict(spatial=(side, side), full=True) for side in (64, 128, 256, 512)}


def arguments(
    draw: Draw,
    dtype: torch.dtype,
    *,
    n: int = 1,
    channels: int = 3,
    spatial: tuple[int, ...] = (4, 4),
    full: bool = False,
    variance: bool = True,
    layout: str = "contiguous",
    given_noise: bool = False,
    counter: bool = False,
) -> dict[str, Any]:
    """Make the arguments; `dtype` and `layout` are those of the network's output.

    full: use the second row of FULL_ROWS, on a state whose buffers are filled. variance: the output has
    variance channels. given_noise: give noise instead of seeds. counter: give the row as a tensor on x's
    device.
    """

    def image(num_channels: int) -> Tensor:
        if layout == "sliced":
            return draw(n, num_channels, *spatial[:-1], 2 * spatial[-1])[..., ::2]
        return (
            channels_last(draw(n, num_channels, *spatial))
            if layout == "channels_last"
            else draw(n, num_channels, *spatial)
        )

    x = draw(n, channels, *spatial)
    if not full:
        call = {"out": image(channels).to(dtype), "table": pack(PLAIN_ROWS, x.device), "row": 0}
        return {"state": SamplerState.start(x, PLAIN_ROWS)} | call
    rows = FULL_ROWS if variance else [FULL_ROWS[0], Row(**vars(FULL_ROWS[1]) | {"l1": 0})]
    state = SamplerState(x, draw(*x.shape), draw(*x.shape), draw(3, *x.shape))
    width = (1 + variance) * channels
    out, out2 = (image(width).to(dtype) for _ in range(2))
    noise_source = (
        {"noise": draw(*x.shape)} if given_noise else {"seeds": as_seeds(range(7, 7 + n)).to(x.device)}
    )
    row = torch.ones(1, dtype=torch.int64, device=x.device) if counter else 1
    call = dict(out=out, table=pack(rows, x.device), row=row, out2=out2, grad=image(channels))
    return {"state": state} | call | noise_source


def advance_state(state: SamplerState, impl: str | None = None, **call: Any) -> tuple[Tensor, ...]:
    """Advance the state, and return its buffers."""
    sampler_step(state, impl=impl, **call)
    return tuple(t for t in (state.x, state.x0, state.saved, state.history) if t is not None)


def wrong() -> list[tuple[dict[str, Any], str]]:
    """Return arguments of `sampler_step` that every implementation rejects."""
    x = torch.ones(1, 3, 4, 4)
    replacements: list[tuple[dict[str, Any], str]] = [
        (dict(out=None), "out"),
        (dict(out=x[0]), "out.shape"),
        (dict(out=x.long()), "out.dtype"),
        (dict(out=x.to("meta")), "out.device"),
        (dict(seeds=[1, 2]), "seeds"),
        (dict(table=[]), "table"),
        (dict(table=pack(PLAIN_ROWS, dtype=torch.float64)), "table"),
        (dict(stream=torch.tensor(1)), "stream"),
        (dict(noise_row=2.0), "noise_row"),
    ]
    for name in ("grad", "noise"):
        replacements += [
            (dict([(name, x.to(torch.float8_e4m3fn))]), f"{name}.dtype"),
            (dict([(name, x[..., 1:])]), f"{name}.shape"),
            (dict([(name, x.to("meta"))]), f"{name}.device"),
        ]
    replacements += [
        (dict(row=value), "row") for value in (1, -1, 0.5, torch.tensor([1.0]), torch.tensor([0, 0]))
    ]
    return replacements + [(dict(noise_row=value), "noise_row") for value in _wrong_counters()]


def _wrong_counters() -> list[Any]:
    meta = torch.ones(1, dtype=torch.int64, device="meta")
    return [2.0, True, "1", -1, 2**32, torch.ones(1), torch.ones(2, dtype=torch.int64), meta]


def _call_step_op(
    call_op: Callable[..., Any], state: SamplerState, out: Tensor, table: PackedTable, row: Any, **inputs: Any
) -> None:
    row_tensor, row_offset = (row, 0) if isinstance(row, Tensor) else (None, row)
    buffers = (state.x, state.x0, state.saved, state.history)
    optional_inputs = [inputs.get(name) for name in ("out2", "grad", "seeds", "noise")]
    call_op(
        "sampler_step_",
        *buffers,
        out,
        *optional_inputs,
        table.device,
        row_tensor,
        row_tensor,
        row_offset,
        row_offset,
        int(Stream.STEPS),
    )


def noise_arguments(
    draw: Draw, dtype: torch.dtype, *, n: int = 1, shape: tuple[int, ...] = (3, 4, 4)
) -> dict[str, Any]:
    """Make the arguments of `normal`; the seeds are 0 and the largest 64-bit numbers."""
    seeds = as_seeds([0, *(2**64 - i for i in range(1, n))])
    return dict(seeds=seeds.to(draw(0).device), shape=shape, row=0, stream=Stream.X_T)


def wrong_noise() -> list[tuple[dict[str, Any], str]]:
    """Return arguments of `normal` that every implementation rejects."""
    replacements: list[tuple[dict[str, Any], str]] = [
        (dict([(name, value)]), name) for name in ("row", "stream") for value in _wrong_counters()
    ]
    seeds = ([1, 2], torch.zeros(2), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, dtype=torch.int32))
    replacements += [(dict(seeds=value), "seeds") for value in seeds]
    return [
        *replacements,
        (dict(shape=(2.0, 3)), "shape[0]"),
        (dict(shape=(2, -3)), "shape[1]"),
        (dict(shape=5), "shape"),
    ]


def _call_noise_op(
    call_op: Callable[..., Any], seeds: Tensor, shape: tuple[int, ...], row: int, stream: int
) -> None:
    call_op("normal", seeds, torch.Size(shape).numel(), row, int(stream))


CASES = [
    OpCases(
        "sampler_step",
        advance_state,
        arguments,
        SMALL,
        REAL,
        wrong,
        dtype_of="output",
        call_raw_ops={"cpp": _call_step_op, "cuda": _call_step_op},
    ),
    OpCases(
        "normal",
        normal,
        noise_arguments,
        (dict(n=2, shape=(3, 5, 7)), dict(n=3, shape=(2,))),
        wrong=wrong_noise,
        dtype_of=None,
        call_raw_ops={"cpp": _call_noise_op, "cuda": _call_noise_op},
    ),
]
