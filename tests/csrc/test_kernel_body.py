"""Tests of the CUDA kernels' bodies on the host: every layout, tail, stride and alignment."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from admfast.ops import (
    TABLES,
    Clip,
    Implementation,
    Row,
    SamplerState,
    as_seeds,
    normal_ref,
    pack,
    sampler_step,
)
from tests.csrc import emulator
from tests.ops.cover import laid_out
from tests.ops.test_sampler_step import CASE_IDS, CASES, Inputs
from tests.ops.tolerance import assert_within, bits

pytestmark = pytest.mark.skipif(emulator.COMPILER is None, reason="g++ is not installed")
NAN = float("nan")
SEEDS = [0, 1, 2**32 - 1, 2**64 - 1]
# The second row uses every coefficient: all kinds of guidance, learned variance, noise, saved point, history.
ROWS = [
    Row(0, 0, k_x=0.5, k_out=0.7, p_0=1, save=True, b=1),
    Row(
        0, 0, k_x=0.9, k_out=-0.4, k_pre=0.1, k_post=0.2, l0=-1, l1=0.5, a=0.3, a_s=0.1, b=0.6, c1=0.2,
        k_mean=0.3, k_z=0.7, mix=0.5, clip=Clip.USED, save=True, p_x=0.4, p_0=-1.3,
    ),
]  # fmt: skip


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add the kernel's body to the implementations of `sampler_step`."""
    table = TABLES["sampler_step"]
    entries = [*table.implementations, Implementation("emulated", emulator.update)]
    monkeypatch.setattr(table, "implementations", entries)


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_the_body_is_within_tolerance(case, emulated):
    inputs = Inputs(case)
    truth, reference = inputs.run("reference", torch.float64), inputs.run("reference")
    got = inputs.run("emulated")
    for i, j in itertools.product(range(len(inputs.rows)), range(2)):
        assert_within(got[i, j], reference[i, j], truth[i, j], f"{('x', 'x0')[j]} after row {i}")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def placed(t: Tensor, offset: int) -> Tensor:
    """Copy `t`, with its strides, to memory that begins `offset` elements after a multiple of 16 bytes."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    room = torch.empty(max(span, 0) + offset + 16, dtype=t.dtype)
    start = -(room.data_ptr() // t.element_size()) % (16 // t.element_size()) + offset
    if t.numel():
        room[start : start + span] = t.as_strided((span,), (1,))
    return room.as_strided(t.shape, t.stride(), start)


def filled(shape: tuple[int, ...], offset: int = 0) -> SamplerState:
    state = SamplerState.start(randn(*shape), ROWS)
    buffers = {name: getattr(state, name) for name in ("x", "x0", "saved", "history")}
    for i, (name, buffer) in enumerate(buffers.items()):
        setattr(state, name, placed(randn(*buffer.shape, seed=i), offset))
    return state


def arguments(shape: tuple[int, ...], dtype: torch.dtype, layout: str, grad: str, offset: int = 0) -> dict:
    n, channels, *spatial = shape
    made = {
        name: placed(laid_out(randn(n, 2 * channels, *spatial, seed=seed).to(dtype), layout), offset)
        for seed, name in ((4, "out"), (5, "out2"))
    }
    made["grad"] = placed(laid_out(randn(*shape, seed=6), grad), offset)
    return made | {"table": pack(ROWS), "row": 1, "seeds": as_seeds(range(n))}


def same(a: SamplerState, b: SamplerState) -> bool:
    return all(torch.equal(bits(getattr(a, f)), bits(getattr(b, f))) for f in ("x", "x0", "saved", "history"))


SHAPES = [
    (2, 3, 8, 8),
    (1, 1, 4, 8),
    (2, 1, 8, 8),
    (3, 3, 4, 4),
    (2, 3, 2, 2),
    (2, 3, 5, 7),
    (1, 2, 8, 8),
    (2, 3, 6, 6),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", emulator.TYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("grad", ["contiguous", "channels_last"])
def test_every_layout_gives_the_bits_of_the_plain_one(shape, dtype, layout, grad):
    # The formula is the same and nothing is contracted, so all layouts, numbers of threads and the C++ op
    # agree bit for bit.
    expected = filled(shape)
    emulator.update(expected, wanted="strided", threads=1, **arguments(shape, dtype, layout, grad))
    native = filled(shape)
    sampler_step(native, **arguments(shape, dtype, layout, grad))
    assert same(native, expected)
    for threads in (1, 7, 100_000):
        state = filled(shape)
        taken, taken_grad = emulator.update(state, threads=threads, **arguments(shape, dtype, layout, grad))
        assert same(state, expected), f"{taken}, gradient {taken_grad}, {threads} threads"
    positions, run = shape[2] * shape[3], 8 if dtype != torch.float32 else 4
    if layout == "contiguous":
        assert taken == ("planar" if positions % run == 0 else "strided")
    elif shape[1] in (1, 3):
        assert taken == ("interleaved" if positions % 4 == 0 else "strided")
    else:
        assert taken == "strided"


@pytest.mark.parametrize("dtype", emulator.TYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "expanded"])
@pytest.mark.parametrize("state_offset", [0, 1])
@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_any_alignment_is_right_and_none_is_assumed(dtype, layout, state_offset, offset):
    shape = (2, 3, 8, 8)
    expected = filled(shape)
    emulator.update(expected, wanted="strided", **arguments(shape, dtype, layout, "contiguous"))
    state = filled(shape, state_offset)
    taken, _ = emulator.update(state, **arguments(shape, dtype, layout, "contiguous", offset))
    assert same(state, expected)
    # The rows of a slice can't be merged into one dimension, so such an output is copied and then aligned.
    assert (taken == "strided") == bool(state_offset or (offset and layout != "sliced"))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", emulator.TYPES, ids=str)
def test_one_output_a_channel_and_no_gradient(dtype, layout):
    shape = (2, 3, 4, 8)
    rows = [Row(0, 0, k_x=0.5, k_out=0.7, a=0.3, b=0.6, l0=-1, k_z=0.5)]
    out = laid_out(randn(*shape).to(dtype), layout)
    expected, state = (SamplerState.start(randn(*shape, seed=1), rows) for _ in range(2))
    given = dict(table=pack(rows), row=0, seeds=as_seeds([1, 2]))
    emulator.update(expected, out, wanted="strided", **given)
    taken, _ = emulator.update(state, out, **given)
    assert taken == ("planar" if layout == "contiguous" else "interleaved")
    assert torch.equal(bits(state.x), bits(expected.x)) and torch.equal(bits(state.x0), bits(expected.x0))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_counters_are_read_where_the_kernel_runs(dtype):
    shape, rows = (2, 3, 8, 8), [Row(0, 0, k_z=1 + i) for i in range(3)]
    seeds = as_seeds([4, 5])
    for i in range(3):
        state = SamplerState.start(torch.zeros(shape), rows)
        row = torch.tensor([9, i, 9], dtype=dtype)[1:2]
        emulator.update(state, torch.zeros(shape), pack(rows), row, seeds=seeds, noise_row=row + 7)
        assert torch.equal(bits(state.x), bits((1 + i) * normal_ref(seeds, shape[1:], i + 7, 1) + 0.0))


@pytest.mark.parametrize(
    ("changes", "row", "noise_row"),
    [
        ({}, 2, 0),
        ({}, -1, 0),
        ({}, 1, -1),
        ({}, 1, 2**32),
        ({"saved": None}, 1, 0),
        ({"history": None}, 1, 0),
        ({"seeds": None}, 1, 0),
        ({"out": randn(2, 3, 5, 7), "out2": None}, 1, 0),
    ],
    ids=["row-high", "row-low", "noise-low", "noise-high", "saved", "history", "seeds", "variance"],
)
def test_a_row_that_cannot_run_makes_the_state_nan(changes, row, noise_row):
    state = filled((2, 3, 5, 7))
    given = arguments((2, 3, 5, 7), torch.float32, "contiguous", "contiguous")
    for name, value in changes.items():
        if hasattr(state, name):
            setattr(state, name, value)
        else:
            given[name] = value
    emulator.update(state, **given | {"row": torch.tensor([row]), "noise_row": torch.tensor([noise_row])})
    assert state.x.isnan().all() and state.x0.isnan().all()
    for buffer in (state.saved, state.history):
        assert buffer is None or buffer.isfinite().all()


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 7, 255, 256, 257])
def test_normals_are_the_reference_s_for_every_remainder_and_alignment(count):
    seeds = as_seeds(SEEDS)
    expected = normal_ref(seeds, (count,), 5, 1)
    assert torch.equal(bits(emulator.normal(seeds, (count,), 5, 1)), bits(expected))
    into = placed(torch.full((len(SEEDS), count), NAN), 1)
    assert torch.equal(bits(emulator.normal(seeds, (count,), 5, 1, into)), bits(expected))


def test_many_normals_are_the_reference_s():
    seeds = as_seeds([2**63])
    assert torch.equal(
        bits(emulator.normal(seeds, (2**20,), 2**32 - 1, 3)), bits(normal_ref(seeds, (2**20,), 2**32 - 1, 3))
    )
