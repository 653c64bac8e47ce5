"""Tests of the update and its noise on a GPU: bits of the noise, layouts, graphs, streams, devices."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from admfast.ops import PackedTable, Row, SamplerState, as_seeds, normal, normal_ref, pack, sampler_step
from admfast.ops.update.cases import FULL_ROWS as ROWS
from tests.ops.cover import laid_out
from tests.ops.tolerance import HALF_AND_SINGLE, assert_within, bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
NAN = float("nan")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def placed(t: Tensor, offset: int = 0, device: str = "cuda") -> Tensor:
    """Copy `t`, with its strides, to a device, `offset` elements after the start of an allocation."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    around = NAN if t.dtype.is_floating_point else -1
    room = torch.full((span + offset,), around, dtype=t.dtype, device=device)
    room[offset:] = t.as_strided((span,), (1,)).to(device)
    return room.as_strided(t.shape, t.stride(), offset)


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> dict:
    n, channels, *spatial = shape
    made = {
        name: laid_out(randn(n, 2 * channels, *spatial, seed=i).to(dtype), layout)
        for i, name in enumerate(("out", "out2"))
    }
    return made | {"grad": laid_out(randn(*shape, seed=2), layout), "seeds": as_seeds(range(7, 7 + n))}


def state_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> SamplerState:
    state = SamplerState.start(randn(*shape, seed=3).to(dtype), ROWS)
    for i, buffer in enumerate((state.saved, state.history)):
        buffer.copy_(randn(*buffer.shape, seed=4 + i))
    state.x0.fill_(NAN)
    return state


def on(state: SamplerState, offset: int = 0, device: str = "cuda") -> SamplerState:
    return SamplerState(
        *(placed(buffer, offset, device) for buffer in (state.x, state.x0, state.saved, state.history))
    )


def check(got: SamplerState, shape: tuple[int, ...], given: dict, rows: list[Row] = ROWS) -> None:
    """Compare the state after row 1 with the reference on the CPU, in float64."""
    results = []
    for dtype in (torch.float32, torch.float64):
        state = state_of(shape, dtype)
        sampler_step(state, table=pack(rows, dtype=dtype), row=1, impl="reference", **given)
        results.append(state)
    for name in ("x", "x0", "saved", "history"):
        reference, truth = (getattr(state, name) for state in results)
        assert_within(getattr(got, name).cpu(), reference, truth, f"{name} of {shape}")


def run(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, offset: int = 0, state_offset: int = 0
) -> None:
    given = inputs(shape, dtype, layout)
    there = {name: placed(value, 0 if name == "seeds" else offset) for name, value in given.items()}
    state = on(state_of(shape), state_offset)
    sampler_step(state, table=pack(ROWS, "cuda"), row=1, impl="cuda", **there)
    check(state, shape, given)


@pytest.mark.parametrize("count", [*range(10), 255, 256, 257, 259, 2**20 - 1, 2**20])
def test_noise_is_the_reference_s_bit_for_bit(count):
    for row, stream in ((0, 0), (2**32 - 1, 3)):
        seeds = as_seeds([0, 2**64 - 1, 0x0123456789ABCDEF] if count < 1000 else [2**63])
        expected = normal_ref(seeds, (count,), row, stream)
        got = normal(seeds.cuda(), (count,), row, stream, impl="cuda").cpu()
        assert torch.equal(bits(got), bits(expected)), f"{int((bits(got) != bits(expected)).sum())} differ"


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 3, 5, 7), (1, 1, 64, 65)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_noise_inside_the_update_is_the_noise_op_s(shape, layout):
    seeds, rows = as_seeds([2**64 - 1 - i for i in range(shape[0])]), [Row(0, 0, k_z=1)]
    state = SamplerState.start(torch.zeros(shape, device="cuda"), rows)
    out = laid_out(torch.zeros(shape), layout).cuda()
    sampler_step(state, out, pack(rows, "cuda"), 0, seeds=seeds.cuda(), noise_row=77, stream=3, impl="cuda")
    assert torch.equal(bits(state.x.cpu()), bits(normal_ref(seeds, shape[1:], 77, 3) + 0.0))


@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (2, 1, 32, 32), (2, 3, 30, 31), (3, 3, 2, 2)], ids=str)
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE.values(), ids=HALF_AND_SINGLE)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "expanded"])
def test_every_type_and_layout(shape, dtype, layout):
    run(shape, dtype, layout)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE.values(), ids=HALF_AND_SINGLE)
@pytest.mark.parametrize(("offset", "state_offset"), [(1, 0), (2, 0), (3, 0), (4, 0), (0, 1), (1, 3)])
def test_any_alignment(dtype, offset, state_offset):
    for layout in ("contiguous", "channels_last"):
        run((2, 3, 16, 16), dtype, layout, offset, state_offset)


@pytest.mark.parametrize("batch", [1, 2, 8, 32])
def test_batches_of_whole_images(batch):
    run((batch, 3, 256, 256), torch.float16, "channels_last")


def test_an_input_may_live_in_the_state_s_memory():
    shape = (2, 3, 24, 24)
    state, copied = on(state_of(shape)), on(state_of(shape))
    table = pack(ROWS, "cuda")
    for s, shared in ((state, state.x), (copied, copied.x.clone())):
        row = Row(0, 0, k_x=0.4, k_out=0.5, k_pre=0.2, a=0.3, b=0.6, k_z=0.5)
        table = pack([row], "cuda")
        turned = shared.transpose(2, 3)
        sampler_step(s, turned, table, 0, grad=turned, noise=turned, out2=turned, impl="cuda")
    assert torch.equal(bits(state.x), bits(copied.x))


def rows_of_a_run(count: int) -> list[Row]:
    return [Row(0, 0, k_x=0.9, k_out=-0.1 * i, l0=-3, l1=0.2, a=0.3, b=0.6, k_z=0.5) for i in range(count)]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_captured_graph_goes_from_row_to_row_by_the_device_s_counter(dtype):
    shape, rows = (2, 3, 16, 16), rows_of_a_run(6)
    out, seeds, table = randn(2, 6, 16, 16).cuda(), as_seeds([1, 2]).cuda(), pack(rows, "cuda")
    eager = SamplerState.start(randn(*shape, seed=1).cuda(), rows)
    for i in range(len(rows)):
        sampler_step(eager, out, table, i, seeds=seeds, noise_row=10 + i, impl="cuda")
    state = SamplerState.start(randn(*shape, seed=1).cuda(), rows)
    row, noise_row = (
        torch.zeros(1, dtype=dtype, device="cuda"),
        torch.full((1,), 10, dtype=dtype, device="cuda"),
    )

    def step() -> None:
        sampler_step(state, out, table, row, seeds=seeds, noise_row=noise_row, impl="cuda")
        row.add_(1)
        noise_row.add_(1)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    assert int(row) == 0, "the capture ran the step"
    for _ in rows:
        graph.replay()
    assert int(row) == len(rows)
    assert torch.equal(bits(state.x), bits(eager.x)) and torch.equal(bits(state.x0), bits(eager.x0))
    graph.replay()  # a row beyond the last one
    assert state.x.isnan().all() and state.x0.isnan().all()


def test_two_streams_do_not_disturb_each_other():
    shape, rows = (8, 3, 64, 64), rows_of_a_run(20)
    outs, table = [randn(8, 6, 64, 64, seed=i).cuda() for i in range(2)], pack(rows, "cuda")
    seeds = [as_seeds(range(8 * i, 8 * i + 8)).cuda() for i in range(2)]
    alone, together = (
        [SamplerState.start(randn(*shape, seed=5 + i).cuda(), rows) for i in range(2)] for _ in range(2)
    )
    for which, i in itertools.product(range(2), range(len(rows))):
        sampler_step(alone[which], outs[which], table, i, seeds=seeds[which], impl="cuda")
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    for i, which in itertools.product(range(len(rows)), range(2)):
        with torch.cuda.stream(streams[which]):
            sampler_step(together[which], outs[which], table, i, seeds=seeds[which], impl="cuda")
    torch.cuda.synchronize()
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(bits(a.x), bits(b.x))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")
def test_runs_where_the_state_is_whatever_device_is_current():
    shape, given = (2, 3, 16, 16), inputs((2, 3, 16, 16))
    state = on(state_of(shape), device="cuda:1")
    there = {name: value.to("cuda:1") for name, value in given.items()}
    assert torch.cuda.current_device() == 0
    sampler_step(state, table=pack(ROWS, "cuda:1"), row=1, impl="cuda", **there)
    assert torch.cuda.current_device() == 0
    check(state, shape, given)
    assert normal(as_seeds([1]).to("cuda:1"), (5,), 0, 0, impl="cuda").device.index == 1


def test_the_first_choice_on_a_gpu_is_cuda_and_reads_nothing_back():
    shape = (2, 3, 16, 16)
    there = {name: value.cuda() for name, value in inputs(shape).items()}
    chosen, named = on(state_of(shape)), on(state_of(shape))
    table, row = pack(ROWS, "cuda"), torch.ones(1, dtype=torch.int64, device="cuda")
    sampler_step(named, table=table, row=row, impl="cuda", **there)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampler_step(chosen, table=table, row=row, **there)
        normal(there["seeds"], (5,), 0, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(bits(chosen.x), bits(named.x))


@pytest.mark.parametrize(
    ("row", "message"),
    [(torch.tensor([1]), "row="), (torch.zeros(2, dtype=torch.int64), "row=")],
    ids=["cpu", "two"],
)
def test_a_counter_that_is_not_one_number_on_the_device_is_refused(row, message):
    state = on(state_of((2, 3, 4, 4)))
    there = {name: value.cuda() for name, value in inputs((2, 3, 4, 4)).items()}
    with pytest.raises(ValueError, match=message):
        sampler_step(state, table=pack(ROWS, "cuda"), row=row, impl="cuda", **there)


def test_the_raw_op_refuses_by_its_name():
    state, table = on(state_of((2, 3, 4, 4))), pack(ROWS, "cuda")
    there = {name: value.cuda() for name, value in inputs((2, 3, 4, 4)).items()}
    one = torch.ones(1, dtype=torch.int64, device="cuda")
    arguments = [
        state.x, state.x0, state.saved, state.history, there["out"], there["out2"], there["grad"],
        there["seeds"], None, table.device, one, one, 0, 0, 1,
    ]  # fmt: skip
    op = torch.ops.admfast.sampler_step_
    for place in (4, 6, 7, 9, 10):
        wrong = list(arguments)
        wrong[place] = arguments[place].cpu()
        with pytest.raises(RuntimeError, match="^sampler_step_: .* is on cpu, x on cuda"):
            op(*wrong)


def test_a_table_of_another_device_is_refused():
    state = on(state_of((2, 3, 4, 4)))
    there = {name: value.cuda() for name, value in inputs((2, 3, 4, 4)).items()}
    table = pack(ROWS)
    with pytest.raises(ValueError, match="table="):
        sampler_step(state, table=PackedTable(table.host, table.device), row=1, **there)
