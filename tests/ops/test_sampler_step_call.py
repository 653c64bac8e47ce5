"""Tests of calls of the update: accepted and refused arguments, unchanged inputs, raw op, torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from admfast import ops
from admfast.errors import InvalidArgument, Unavailable
from admfast.ops import TABLES, Clip, Row, SamplerState, as_seeds, native, pack
from admfast.ops.update.cases import FULL_ROWS
from tests.ops.anywhere import runnable, sampler_step
from tests.ops.tolerance import bits, unmodified

IMPLEMENTATIONS = runnable("sampler_step")
ON_THE_CPU = [None, "cpp", "reference"]
needs_native = pytest.mark.skipif(native.reason_missing() is not None, reason="no compiled ops")
SHAPE = (2, 3, 4, 5)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def filled(shape: tuple[int, ...] = SHAPE) -> tuple[SamplerState, dict[str, Any]]:
    """Return a state for the rows FULL_ROWS with every buffer filled, and the other arguments of row 1."""
    state = SamplerState.start(randn(*shape), FULL_ROWS)
    for i, buffer in enumerate((state.x0, state.saved, state.history)):
        buffer.copy_(randn(*buffer.shape, seed=1 + i))
    n, channels, *spatial = shape
    out, out2 = (randn(n, 2 * channels, *spatial, seed=seed) for seed in (4, 5))
    arguments = dict(
        out=out, table=pack(FULL_ROWS), row=1, out2=out2, grad=randn(*shape, seed=6), seeds=as_seeds(range(n))
    )
    return state, arguments


def buffers(state: SamplerState) -> list[Tensor]:
    return [state.x, state.x0, state.saved, state.history]


def same(a: SamplerState, b: SamplerState) -> bool:
    return all(torch.equal(bits(s), bits(t)) for s, t in zip(buffers(a), buffers(b), strict=True))


@needs_native
def test_the_first_choice_on_a_cpu_is_compiled_and_writes_every_buffer():
    chosen, arguments = filled()
    named, _ = filled()
    before = [t.clone() for t in buffers(chosen)]
    sampler_step(chosen, **arguments)
    sampler_step(named, impl="cpp", **arguments)
    assert same(chosen, named)
    assert not any(torch.equal(a, b) for a, b in zip(before, buffers(chosen), strict=True))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_float64_is_for_the_reference(impl):
    rows = [Row(0, 0, a=1, b=1, k_out=1)]
    state = SamplerState.start(randn(*SHAPE).double(), rows)
    call = dict(out=randn(*SHAPE), table=pack(rows, dtype=torch.float64), row=0)
    entry = TABLES["sampler_step"].find(impl)
    if entry.reason_missing() or entry.reason_unsupported(state, **call):
        with pytest.raises(Unavailable, match=f"impl='{impl}': sampler_step can't run on it here"):
            sampler_step(state, impl=impl, **call)
    else:
        sampler_step(state, impl=impl, **call)
        assert state.x.dtype == torch.float64


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_leaves_no_graph_behind(impl):
    rows = [Row(0, 0, a=1, b=1, k_out=1)]
    state = SamplerState.start(randn(*SHAPE).requires_grad_(True), rows)
    sampler_step(state, randn(*SHAPE).requires_grad_(True), pack(rows), 0, impl=impl)
    assert not state.x.requires_grad and not state.x0.requires_grad


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0)], ids=str)
def test_nothing_is_a_size(impl, shape):
    state, arguments = filled(shape)
    sampler_step(state, impl=impl, **arguments)
    assert state.x.shape == shape


def test_start_copies_x_and_makes_only_what_the_rows_use():
    x = randn(*SHAPE).to(memory_format=torch.channels_last)
    with unmodified(x=x):
        state = SamplerState.start(x, [Row(0, 0)])
        assert state.saved is None and state.history is None
        assert state.x.is_contiguous() and torch.equal(state.x, x)
        state.x.fill_(1)
    assert SamplerState.start(x, [Row(0, 0, save=True)]).saved.shape == SHAPE
    assert SamplerState.start(x, [Row(0, 0, p_0=1)]).history.shape == (3, *SHAPE)


def test_pack_keeps_float64_and_uploads_the_asked_dtype():
    table = pack([Row(0, 0, k_x=1 / 3), Row(0, 0, p_0=1, a=0.1)])
    assert table.host.dtype == torch.float64 and float(table.host[0, 0]) == 1 / 3
    assert table.device.dtype == torch.float32 and len(table) == 2
    assert table.used_columns == (frozenset({"k_x", "clip"}), frozenset({"a", "clip", "p_0", "push_slot"}))
    assert pack([Row(0, 0)], dtype=torch.float64).device.dtype == torch.float64
    assert len(pack([])) == 0


OTHER = randn(2, 3, 4, 6)
WRONG: list[tuple[str, dict[str, Any]]] = [
    ("out.shape", dict(out=randn(2, 9, 4, 5))),
    ("out.shape", dict(out=randn(2, 6, 5, 4))),
    ("out.shape", dict(out=randn(1, 6, 4, 5))),
    ("out.shape=(2, 3, 4, 5)", dict(out=randn(2, 3, 4, 5), out2=None)),  # the row reads variance channels
    ("out.dtype", dict(out=torch.zeros(2, 6, 4, 5, dtype=torch.int64), out2=None)),
    ("out.device", dict(out=torch.zeros(2, 6, 4, 5, device="meta"), out2=None)),
    ("out2=", dict(out2=randn(2, 3, 4, 5))),
    ("out2=", dict(out2=randn(2, 6, 4, 5).half())),
    ("grad.shape", dict(grad=OTHER)),
    ("grad.dtype", dict(grad=torch.zeros(SHAPE, dtype=torch.int32))),
    ("grad.device", dict(grad=torch.zeros(SHAPE, device="meta"))),
    ("noise.shape", dict(noise=OTHER)),
    ("noise.dtype", dict(noise=torch.zeros(SHAPE, dtype=torch.bool))),
    ("seeds=None", dict(seeds=None)),
    ("seeds=", dict(seeds=as_seeds([1]))),
    ("seeds=", dict(seeds=torch.zeros(2))),
    ("seeds=", dict(seeds=torch.zeros(2, dtype=torch.int32), noise=randn(*SHAPE))),
    ("seeds.device", dict(seeds=torch.zeros(2, dtype=torch.int64, device="meta"))),
    ("table=", dict(table=pack(FULL_ROWS, dtype=torch.float64))),
    ("table=", dict(table=pack(FULL_ROWS, device="meta"))),
    ("row=2", dict(row=2)),
    ("row=-1", dict(row=-1)),
    ("row=0.5", dict(row=0.5)),
    ("row=2", dict(row=torch.tensor([2]))),
    ("row=-1", dict(row=torch.tensor([-1]))),
    ("row=((2,)", dict(row=torch.tensor([0, 1]))),
    ("row=((1,)", dict(row=torch.tensor([1.0]))),
    ("row=((1,)", dict(row=torch.tensor([1], device="meta"))),
    ("noise_row=-1", dict(noise_row=-1)),
    ("noise_row=4294967296", dict(noise_row=2**32)),
    ("stream=-1", dict(stream=-1)),
    ("stream=4294967296", dict(stream=2**32)),
    ("state.x=", dict(state_x=randn(2, 3, 5, 4).transpose(2, 3))),
    ("state.x=(2, 3)", dict(state_x=randn(2, 3))),
    ("state.x.dtype", dict(state_x=randn(*SHAPE).half(), table=pack(FULL_ROWS, dtype=torch.float16))),
    ("state.x0=", dict(state_x0=OTHER)),
    ("state.x0=", dict(state_x0=randn(*SHAPE).double())),
    ("state.x0=(60, 20, 1, 4)", dict(state_x0=randn(2, 3, 5, 4).transpose(2, 3))),
    ("state.saved=None", dict(state_saved=None)),
    ("state.saved=", dict(state_saved=randn(1, 3, 4, 5))),
    ("state.history=None", dict(state_history=None)),
    ("state.history=", dict(state_history=randn(2, *SHAPE))),
    ("state.history=", dict(state_history=randn(3, 3, 2, 4, 5))),
]


@pytest.mark.parametrize("impl", ON_THE_CPU)
@pytest.mark.parametrize(("name", "changes"), WRONG, ids=[f"{i}-{name}" for i, (name, _) in enumerate(WRONG)])
def test_wrong_arguments_are_named(name, changes, impl):
    state, arguments = filled()
    for key, value in changes.items():
        if key.startswith("state_"):
            setattr(state, key.removeprefix("state_"), value)
        else:
            arguments[key] = value
    before = [None if t is None else t.clone() for t in buffers(state)]
    with pytest.raises(InvalidArgument) as caught:
        sampler_step(state, impl=impl, **arguments)
    assert str(caught.value).startswith(name), caught.value
    for old, now in zip(before, buffers(state), strict=True):
        assert old is None or torch.equal(old, now), "a refused call changed the state"


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_row_without_noise_needs_no_seeds_and_one_without_history_no_buffers(impl):
    rows = [Row(0, 0, k_x=1, b=1), *FULL_ROWS]
    state = SamplerState(randn(*SHAPE), torch.zeros(SHAPE))
    sampler_step(state, randn(*SHAPE), pack(rows), 0, impl=impl)
    sampler_step(state, randn(*SHAPE), pack(rows[:1]), torch.tensor([0]), impl=impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["x", "x turned", "x0", "saved", "history"])
def test_an_input_may_live_in_the_state_s_memory(impl, name):
    # A model may return its argument or a view of it, so the update must read all values before it writes.
    shape = (2, 3, 24, 24)

    def call(copied: bool) -> SamplerState:
        state, arguments = filled(shape)
        views = {"x turned": state.x.transpose(2, 3), "history": state.history[1]}
        shared = views[name] if name in views else getattr(state, name)
        given = shared.clone() if copied else shared
        rows = [Row(0, 0, p_0=1, save=True)] * 2
        rows += [
            Row(
                0,
                0,
                k_x=0.4,
                k_out=0.5,
                k_pre=0.2,
                a=0.3,
                b=0.6,
                k_z=0.5,
                c1=0.1,
                a_s=0.2,
                save=True,
                p_x=0.3,
                p_0=0.7,
            )
        ]
        sampler_step(state, given, pack(rows), 2, grad=given, noise=given, out2=given, impl=impl)
        return state

    assert same(call(copied=False), call(copied=True))


@needs_native
def test_the_number_of_threads_changes_nothing():
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            state, arguments = filled((3, 3, 67, 65))
            sampler_step(state, impl="cpp", **arguments)
            results.append(state)
    finally:
        torch.set_num_threads(threads)
    assert same(*results)


def raw_arguments(state: SamplerState, **changes: Any) -> list[Any]:
    """Return the raw op's arguments, in order, for row 1 of FULL_ROWS."""
    _, given = filled()
    names = dict(
        x=state.x, x0=state.x0, saved=state.saved, history=state.history,
        out=given["out"], out2=given["out2"], grad=given["grad"], seeds=given["seeds"], noise=None,
        table=given["table"].device, row=torch.tensor([1]), noise_row=torch.tensor([1]),
        row_at=0, noise_at=0, stream=1,
    )  # fmt: skip
    assert not changes.keys() - names.keys()
    return list((names | changes).values())


WIDE = pack(FULL_ROWS).device.double()
BAD_SLOT = pack(FULL_ROWS).device.clone()
BAD_SLOT[1, -1] = 3


@needs_native
@pytest.mark.parametrize(
    "changes",
    [
        dict(x=randn(2, 3)),
        dict(x=randn(*SHAPE).double()),
        dict(x=randn(2, 3, 5, 4).transpose(2, 3)),
        dict(x0=OTHER),
        dict(x0=randn(*SHAPE).half()),
        dict(saved=None),
        dict(saved=OTHER),
        dict(history=None),
        dict(history=randn(2, *SHAPE)),
        dict(history=randn(3, 3, 2, 4, 5)),
        dict(out=randn(*SHAPE), out2=None),
        dict(out=randn(2, 6, 5, 4)),
        dict(out=randn(2, 6, 4, 5).double()),
        dict(out2=randn(*SHAPE)),
        dict(out2=randn(2, 6, 4, 5).half()),
        dict(grad=OTHER),
        dict(noise=OTHER),
        dict(seeds=None),
        dict(seeds=as_seeds([1])),
        dict(seeds=as_seeds(range(4))[::2]),
        dict(seeds=torch.zeros(2)),
        dict(table=WIDE),
        dict(table=pack(FULL_ROWS).device[:, :-1]),
        dict(table=BAD_SLOT),
        dict(row=torch.tensor([2])),
        dict(row=torch.tensor([-1])),
        dict(row=torch.tensor([0, 1])),
        dict(row=torch.tensor([1.0])),
        dict(row=None, row_at=2),
        dict(row=None, row_at=-1),
        dict(noise_row=None, noise_at=2**32),
        dict(noise_row=None, noise_at=-1),
        dict(noise_row=torch.tensor([2**32 - 1]), noise_at=1),
        dict(noise_row=torch.tensor([-1])),
        dict(noise_row=torch.tensor([0, 1])),
        dict(stream=2**32),
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_the_raw_op_refuses_by_its_name_and_writes_nothing(changes):
    state, _ = filled()
    with unmodified(x=state.x, x0=state.x0, saved=state.saved, history=state.history):
        with pytest.raises(RuntimeError, match="^sampler_step_: "):
            torch.ops.admfast.sampler_step_(*raw_arguments(state, **changes))


@needs_native
def test_the_raw_op_compiles_as_one_graph_and_writes_in_place():
    plain, _ = filled()
    torch.ops.admfast.sampler_step_(*raw_arguments(plain))
    plain.x.mul_(2)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(x: Tensor, x0: Tensor, saved: Tensor, history: Tensor, *rest: Any) -> Tensor:
        torch.ops.admfast.sampler_step_(x, x0, saved, history, *rest)
        x.mul_(2)
        return x + 1

    compiled, _ = filled()
    places = [t.data_ptr() for t in buffers(compiled)]
    after = step(*raw_arguments(compiled))
    assert same(compiled, plain) and torch.equal(after, plain.x + 1)
    assert [t.data_ptr() for t in buffers(compiled)] == places


@needs_native
@pytest.mark.parametrize("row", [1, torch.tensor([1])], ids=["a number", "a counter"])
def test_the_update_compiles_as_one_graph(row):
    plain, arguments = filled()
    arguments["row"] = row
    ops.sampler_step(plain, **arguments)
    compiled, _ = filled()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(**given: Any) -> Tensor:
        ops.sampler_step(compiled, **given)
        return compiled.x * 2

    assert torch.equal(step(**arguments), plain.x * 2) and same(compiled, plain)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("p_x", "p_0", "value"), [(0, 1, 2), (2, -1, 8), (0.5, 0, 2.5)])
def test_a_row_pushes_a_sum_of_the_old_x_and_x0(impl, p_x, p_0, value):
    rows = [Row(0, 0, k_out=1, b=1, clip=Clip.NONE, p_x=p_x, p_0=p_0)]
    state = SamplerState.start(torch.full((1, 1, 3), 5.0), rows)
    sampler_step(state, torch.full((1, 1, 3), 2.0), pack(rows), 0, impl=impl)
    assert state.history[0].flatten().tolist() == [value] * 3
    assert state.x.flatten().tolist() == [2] * 3
