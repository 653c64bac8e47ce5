"""Tests of every implementation of the update against its formula, by term and over all pairs of options."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from admfast import ops
from admfast.errors import InvalidArgument, Unavailable
from admfast.ops import TABLES, Clip, Row, SamplerState, Stream, as_seeds, normal_ref, pack
from tests.ops.anywhere import Mover, runnable, sampler_step
from tests.ops.cover import all_pairs, case_id, laid_out
from tests.ops.tolerance import (
    DEVICES,
    HALF_AND_SINGLE,
    assert_same_formula,
    assert_within,
    bits,
    unmodified,
)

IMPLEMENTATIONS = runnable("sampler_step")
NAN = float("nan")


def textbook(row: Row, x, saved, pushed, out, out2, grad, noise):
    """Compute the formula directly. Return (x_next, reported x0, saved, pushed), with pushed newest first."""
    channels = x.shape[1]
    o = out.to(x.dtype)
    mean_part = o[:, :channels]
    if out2 is not None:
        mean_part = mean_part + row.mix * (mean_part - out2[:, :channels].to(x.dtype))
    g = torch.zeros_like(x) if grad is None else grad.to(x.dtype)
    z = torch.zeros_like(x) if noise is None else noise.to(x.dtype)
    x0 = row.k_x * x + row.k_out * mean_part + row.k_pre * g
    used = x0.clamp(-1, 1) if row.clip == Clip.USED else x0
    reported = x0 if row.clip == Clip.NONE else x0.clamp(-1, 1)
    used, reported = used + row.k_post * g, reported + row.k_post * g
    log_var = row.l0 + row.l1 * o[:, channels:] if row.l1 else torch.full_like(x, row.l0)
    x_next = row.a * x + row.b * used + row.k_mean * log_var.exp() * g + row.k_z * (log_var / 2).exp() * z
    if row.a_s:
        x_next = x_next + row.a_s * saved
    for c, h in zip((row.c1, row.c2, row.c3), pushed, strict=False):
        x_next = x_next + c * h
    value = row.p_x * x + row.p_0 * reported
    return x_next, reported, x if row.save else saved, [value, *pushed][:3] if row.pushes else pushed


SHAPES = [
    (1, 3, 5, 7),
    (2, 1, 9, 9),
    (2, 3, 16, 16),  # more than one chunk of 512
    (1, 3, 37, 41),  # more than one share of 4096, not a multiple of four
    (2, 5, 30, 31),
    (1, 1, 64, 65),
    (3, 3, 7),
    (2, 3, 3, 5, 4),
]
CASES = all_pairs(
    shape=SHAPES,
    out=list(HALF_AND_SINGLE),
    layout=["contiguous", "channels_last", "sliced", "expanded"],
    variance=["none", "ignored", "read"],
    out2=[False, True],
    grad=["none", "contiguous", "channels_last", "fp16"],
    noise=["made", "given", "none"],
    saved=[False, True],
    row=["int", "tensor"],
    clip=list(Clip),
)
CASE_IDS = [f"{i}-{case_id(case)}" for i, case in enumerate(CASES)]
PUSHES = [True, False, True, True, True, True, False, True]


def rows_of(case: dict[str, Any], generator: torch.Generator) -> list[Row]:
    """Return eight rows of random coefficients. They push six times, twice round the ring of three."""

    def number(low: float = -0.8, high: float = 0.8) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))

    rows, pushed = [], 0
    for i, push in enumerate(PUSHES):
        c = [number() if age < pushed else 0.0 for age in range(3)]
        rows.append(
            Row(
                t_net=0.0,
                t_clf=0.0,
                k_x=number(),
                k_out=number(),
                k_pre=number(),
                k_post=number(),
                l0=number(-2, 0),
                l1=number() if case["variance"] == "read" else 0.0,
                a=number(),
                a_s=number() if case["saved"] and i > 0 else 0.0,
                b=number(),
                c1=c[0],
                c2=c[1],
                c3=c[2],
                k_mean=number(),
                k_z=0.0 if case["noise"] == "none" else number(),
                mix=number(),
                clip=case["clip"] if i % 2 == 0 else Clip(i % 3),
                save=case["saved"] and i in (0, 3),
                p_x=number() if push and i % 3 else 0.0,
                p_0=number() if push else 0.0,
            )
        )
        pushed += push
    return rows


class Inputs:
    """All inputs of a case, from a fixed seed, in float32 and the case's dtypes."""

    def __init__(self, case: dict[str, Any]):
        generator = torch.Generator().manual_seed(CASES.index(case))
        self.case, self.rows = case, rows_of(case, generator)
        n, channels, *spatial = case["shape"]

        def random(times: int = 1) -> Tensor:
            return torch.randn((n, times * channels, *spatial), generator=generator)

        def output() -> Tensor:
            made = random(1 if case["variance"] == "none" else 2).to(HALF_AND_SINGLE[case["out"]])
            return laid_out(made, case["layout"])

        self.x = random()
        self.outs = [output() for _ in self.rows]
        self.outs2 = [output() if case["out2"] else None for _ in self.rows]
        self.grads: list[Tensor | None] = [None] * len(self.rows)
        if case["grad"] != "none":
            dtype = torch.float16 if case["grad"] == "fp16" else torch.float32
            self.grads = [laid_out(random().to(dtype), case["grad"]) for _ in self.rows]
        self.seeds = as_seeds(range(2**40, 2**40 + n))
        self.noises = [
            normal_ref(self.seeds, (channels, *spatial), 100 + i, 3) for i in range(len(self.rows))
        ]
        if case["noise"] == "given":
            self.noises = [laid_out(z, "channels_last") for z in self.noises]

    def by_the_book(self, dtype: torch.dtype) -> Tensor:
        """Return x and x0 after every row, [rows, 2, *shape], by the formula."""
        x, saved, pushed, after = self.x.to(dtype), None, [], []
        for row, *inputs in zip(self.rows, self.outs, self.outs2, self.grads, self.noises, strict=True):
            x, x0, saved, pushed = textbook(row, x, saved, pushed, *inputs)
            after.append(torch.stack([x, x0]))
        return torch.stack(after)

    def run(self, impl: str | None, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
        """Return the same by the op, with NaN in the buffers that the rows must write before reading."""

        there = Mover(device)
        state = SamplerState.start(self.x.to(device, dtype), self.rows)
        for buffer in (state.x0, state.saved, state.history):
            if buffer is not None:
                buffer.fill_(NAN)
        table, after = pack(self.rows, device, dtype), []
        for i in range(len(self.rows)):
            out, given = there(self.outs[i]), {"out2": there(self.outs2[i]), "grad": there(self.grads[i])}
            if self.case["noise"] == "made":
                given["seeds"] = self.seeds.to(device)
            elif self.case["noise"] == "given":
                given["noise"] = there(self.noises[i])
            row = torch.tensor([i], device=device) if self.case["row"] == "tensor" else i
            if self.case["noise"] == "none" and self.case["row"] == "tensor" and device != "cpu":
                given["seeds"] = self.seeds.to(device)
            with unmodified(out=out, host=table.host, device=table.device, **given):
                ops.sampler_step(state, out, table, row, noise_row=100 + i, stream=3, impl=impl, **given)
            after.append(torch.stack([state.x, state.x0]))
        return torch.stack(after).cpu()


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_the_reference_is_the_formula(case):
    inputs = Inputs(case)
    assert_same_formula(lambda dtype: inputs.run("reference", dtype), inputs.by_the_book, "x and x0")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", TABLES["sampler_step"].names())
@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_every_implementation_is_within_tolerance(case, impl, device):
    inputs = Inputs(case)
    state = SamplerState.start(inputs.x.to(device), inputs.rows)
    entry = TABLES["sampler_step"].find(impl)
    if entry.reason_missing() or entry.reason_unsupported(state, inputs.outs[0].to(device), None, 0):
        with pytest.raises(Unavailable, match=f"impl='{impl}'"):
            inputs.run(impl, device=device)
        return
    truth, reference = inputs.run("reference", torch.float64), inputs.run("reference")
    got = inputs.run(impl, device=device)
    for i in range(len(inputs.rows)):
        for j, name in enumerate(("x", "x0")):
            assert_within(got[i, j], reference[i, j], truth[i, j], f"{name} after row {i}")


SHAPE = (2, 3, 4, 5)


def given(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X, OUT, OUT2, G, Z, SAVED, V, V2 = (given(seed) for seed in range(8))
HISTORY = given(9, (3, *SHAPE))


def advance(
    row: Row, impl: str | None, out: Tensor = OUT, dtype: torch.dtype = torch.float32, **options: Any
):
    """Return (x, x0) after this row, which follows three rows that pushed (h1 = HISTORY[0])."""
    before = [Row(0, 0, p_0=1)] * 3
    table, state = (
        pack([*before, row], dtype=dtype),
        SamplerState(X.to(dtype), torch.full(SHAPE, NAN, dtype=dtype)),
    )
    state.x, state.saved = state.x.clone(), SAVED.to(dtype)
    state.history = HISTORY.flip(0).to(dtype)  # slots 0, 1, 2 in the order of their pushes
    options.setdefault("noise", Z)
    sampler_step(state, out, table, 3, impl=impl, **options)
    return state.x, state.x0


LOG4 = math.log(4)
BOTH, BOTH2 = torch.cat([OUT, V], 1), torch.cat([OUT2, V2], 1)
# Each term by itself: the row, the expected x and x0, and further arguments. Factors 0.5 and 2 are exact.
TERMS: dict[str, tuple[dict[str, Any], Any, Any, dict[str, Any]]] = {
    "k_x": (dict(k_x=0.5, b=2), lambda d: X.to(d), lambda d: 0.5 * X.to(d), {}),
    "k_out": (dict(k_out=0.5, b=2), lambda d: OUT.to(d), lambda d: 0.5 * OUT.to(d), {}),
    "k_pre": (dict(k_pre=0.5, b=2), lambda d: G.to(d), lambda d: 0.5 * G.to(d), {"grad": G}),
    "k_post": (dict(k_post=0.5, b=2), lambda d: G.to(d), lambda d: 0.5 * G.to(d), {"grad": G}),
    "a": (dict(a=0.7), lambda d: 0.7 * X.to(d), None, {}),
    "b": (dict(k_x=1, b=0.7), lambda d: 0.7 * X.to(d), lambda d: X.to(d), {}),
    "a_s": (dict(a_s=0.7), lambda d: 0.7 * SAVED.to(d), None, {}),
    "c1": (dict(c1=0.7), lambda d: 0.7 * HISTORY[0].to(d), None, {}),
    "c2": (dict(c2=0.7), lambda d: 0.7 * HISTORY[1].to(d), None, {}),
    "c3": (dict(c3=0.7), lambda d: 0.7 * HISTORY[2].to(d), None, {}),
    "k_mean": (dict(k_mean=0.7, l0=LOG4), lambda d: 2.8 * G.to(d), None, {"grad": G}),
    "k_z": (dict(k_z=0.7, l0=LOG4), lambda d: 1.4 * Z.to(d), None, {}),
    "l1 of the mean": (
        dict(k_mean=1, l0=LOG4, l1=0.7),
        lambda d: 4 * (0.7 * V.to(d)).exp() * G.to(d),
        None,
        {"grad": G, "out": BOTH},
    ),
    "l1 of the noise": (
        dict(k_z=1, l0=LOG4, l1=0.7),
        lambda d: 2 * (0.35 * V.to(d)).exp() * Z.to(d),
        None,
        {"out": BOTH},
    ),
    "mix": (
        dict(k_out=1, b=1, mix=0.7),
        lambda d: 1.7 * OUT.to(d) - 0.7 * OUT2.to(d),
        lambda d: 1.7 * OUT.to(d) - 0.7 * OUT2.to(d),
        {"out2": OUT2},
    ),
    "no mix": (dict(k_out=1, b=1), OUT.to, OUT.to, {"out2": torch.full(SHAPE, NAN)}),
    "no mix of the variance": (
        dict(k_z=1, l1=1, mix=0.7),
        lambda d: (0.5 * V.to(d)).exp() * Z.to(d),
        None,
        {"out": BOTH, "out2": BOTH2},
    ),
}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("term", TERMS)
def test_each_term_alone(term, impl):
    coefficients, x_next, x0, options = TERMS[term]
    row = Row(0, 0, clip=Clip.NONE, **coefficients)
    got_x, got_x0 = advance(row, impl, **options)
    zero = torch.zeros(SHAPE)
    for got, expected, name in ((got_x, x_next, "x"), (got_x0, x0 or zero.to, "x0")):
        truth, single = expected(torch.float64), expected(torch.float32)
        assert_within(got, single, truth, f"{name} by {term}")
    if impl == "reference":
        assert_same_formula(lambda d: advance(row, impl, dtype=d, **options)[0], x_next, f"x by {term}")


def test_the_terms_are_all_of_them():
    named = {name for coefficients, *_ in TERMS.values() for name in coefficients}
    others = {"t_net", "t_clf", "clip", "save", "p_x", "p_0", "index", "timestep"}
    assert named | others == set(Row.__dataclass_fields__)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("clip", "pre", "post", "used", "reported"),
    [
        (Clip.NONE, 0, 0.25, [-2.75, -0.25, 0.75, 3.25], [-2.75, -0.25, 0.75, 3.25]),
        (Clip.USED, 0, 0.25, [-0.75, -0.25, 0.75, 1.25], [-0.75, -0.25, 0.75, 1.25]),
        (Clip.REPORTED, 0, 0.25, [-2.75, -0.25, 0.75, 3.25], [-0.75, -0.25, 0.75, 1.25]),
        (Clip.USED, 0.75, 0, [-1, 0.25, 1, 1], [-1, 0.25, 1, 1]),
        (Clip.REPORTED, 0.75, 0, [-2.25, 0.25, 1.25, 3.75], [-1, 0.25, 1, 1]),
    ],
)
def test_the_limit_stands_between_the_two_guidances(impl, clip, pre, post, used, reported):
    x = torch.tensor([-3, -0.5, 0.5, 3]).view(1, 1, 4)
    rows = [Row(0, 0, k_x=1, k_pre=pre, k_post=post, b=1, clip=clip, p_0=1)]
    state = SamplerState.start(x, rows)
    sampler_step(state, torch.zeros_like(x), pack(rows), 0, grad=torch.ones_like(x), impl=impl)
    assert state.x.flatten().tolist() == used
    assert state.x0.flatten().tolist() == reported == state.history[0].flatten().tolist()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_history_is_addressed_by_age_round_the_ring(impl):
    # Row i pushes i + 1, and x becomes h1 + 100 h2 + 10000 h3: all are exact integers.
    pushes = [True, True, False, True, True, True, False, True, True, False]
    rows, pushed, expected = [], [], []
    for i, push in enumerate(pushes):
        ages = [100.0**age if age < len(pushed) else 0.0 for age in range(3)]
        rows.append(Row(0, 0, k_out=1, c1=ages[0], c2=ages[1], c3=ages[2], clip=Clip.NONE, p_0=float(push)))
        expected.append(sum(c * h for c, h in zip(ages, reversed(pushed), strict=False)))
        pushed += [i + 1] if push else []
    state, table = SamplerState.start(torch.zeros(1, 1, 3), rows), pack(rows)
    state.history.fill_(NAN)
    for i in range(len(rows)):
        sampler_step(state, torch.full((1, 1, 3), i + 1.0), table, i, impl=impl)
        assert state.x.flatten().tolist() == [expected[i]] * 3, f"row {i}"


def test_history_that_is_not_there_is_refused():
    rows = [Row(0, 0, p_0=1), Row(0, 0, c2=0.5)]
    with pytest.raises(InvalidArgument, match=r"^rows\[1\].c2=0.5: .*only 1 values were pushed"):
        pack(rows)
    with pytest.raises(InvalidArgument, match=r"^rows\[0\].c1=1"):
        pack([Row(0, 0, c1=1, p_0=1)])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_saved_point_is_x_before_the_row(impl):
    rows = [Row(0, 0, a=2, save=True), Row(0, 0, a=3, a_s=1), Row(0, 0, a=1, a_s=1, save=True)]
    state, table = SamplerState.start(torch.ones(1, 1, 3), rows), pack(rows)
    state.saved.fill_(NAN)
    seen = []
    for i in range(3):
        sampler_step(state, torch.zeros(1, 1, 3), table, i, impl=impl)
        seen.append((float(state.x[0, 0, 0]), float(state.saved[0, 0, 0])))
    assert seen == [(2, 1), (7, 1), (8, 7)]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_noise_made_inside_is_the_noise_op_s(impl, shape):
    seeds = as_seeds([2**64 - 1 - i for i in range(shape[0])])
    results = []
    for row, noise_row, stream in ((0, None, 1), (0, 2**32 - 1, 3), (0, torch.tensor([77]), Stream.STEPS)):
        counter = row if noise_row is None else int(noise_row)
        z = normal_ref(seeds, shape[1:], counter, stream)
        for options in ({"seeds": seeds}, {"noise": z}, {"noise": z.double()}):
            state = SamplerState.start(torch.zeros(shape), [])
            table = pack([Row(0, 0, k_z=1)])
            sampler_step(
                state,
                torch.zeros(shape),
                table,
                row,
                noise_row=noise_row,
                stream=stream,
                impl=impl,
                **options,
            )
            assert torch.equal(bits(state.x), bits(z + 0.0))
        results.append(z)
    assert not torch.equal(results[0], results[1])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_noise_counts_by_the_row_where_nothing_else_is_said(impl):
    seeds, rows = as_seeds([4, 5]), [Row(0, 0, k_z=1)] * 3
    for row in (2, torch.tensor([2])):
        state = SamplerState.start(torch.zeros(SHAPE), rows)
        sampler_step(state, torch.zeros(SHAPE), pack(rows), row, seeds=seeds, impl=impl)
        assert torch.equal(bits(state.x), bits(normal_ref(seeds, SHAPE[1:], 2, Stream.STEPS) + 0.0))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_all_ways_to_say_a_row_agree(impl):
    rows = [Row(0, 0, k_x=0.3 + i, k_out=0.7, a=0.2, b=0.5 * i, k_z=0.1) for i in range(3)]
    results = []
    for row in (2, torch.tensor([2]), torch.tensor(2), torch.tensor([[2]], dtype=torch.int32)):
        state = SamplerState.start(X, rows)
        sampler_step(state, OUT, pack(rows), row, noise=Z, impl=impl)
        results.append(torch.stack([state.x, state.x0]))
    assert all(torch.equal(bits(result), bits(results[0])) for result in results)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("clip", list(Clip))
def test_nan_stays_where_it_is_and_infinity_is_limited(impl, clip):
    row = Row(0, 0, k_x=0.5, k_out=0.5, l0=-1, l1=0.5, a=0.3, b=0.4, k_mean=0.2, k_z=0.5, clip=clip)
    clean = advance(row, impl, out=BOTH, grad=G)
    for value in (NAN, math.inf, -math.inf):
        out = BOTH.clone()
        out[1, 2, 3, 4] = value
        for got, before, name in zip(advance(row, impl, out=out, grad=G), clean, ("x", "x0"), strict=True):
            there = got[1, 2, 3, 4].clone()
            if math.isnan(value):
                assert there.isnan(), name
            elif clip == Clip.USED or (clip == Clip.REPORTED and name == "x0"):
                assert there.isfinite(), name
            else:
                assert float(there) == value, name
            got[1, 2, 3, 4] = before[1, 2, 3, 4]
            assert torch.equal(bits(got), bits(before)), f"{name}: other elements changed"
    out = BOTH.clone()
    out[0, 4, 0, 0] = NAN  # the variance channel of x[0, 1, 0, 0]
    x, x0 = advance(row, impl, out=out, grad=G)
    assert x.isnan().nonzero().tolist() == [[0, 1, 0, 0]] and torch.equal(x0, clean[1])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_variance_of_zero_leaves_neither_noise_nor_guidance(impl):
    row = Row(0, 0, k_x=0.5, k_out=0.5, a=0.3, b=0.4, l0=-math.inf, k_mean=1, k_z=1)
    with_it = advance(row, impl, grad=G)
    without = advance(replace(row, l0=0.0, k_mean=0.0, k_z=0.0), impl, grad=G)
    assert all(torch.equal(a, b) for a, b in zip(with_it, without, strict=True))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_exponential_is_right_over_its_whole_range(impl):
    # sigma^2 = e^v. Errors are relative, so that small values count as much as large ones.
    v = torch.linspace(-87, 88, 4001, dtype=torch.float64).float().view(1, 1, -1)
    rows = [Row(0, 0, l1=1, k_mean=1)]
    state = SamplerState.start(torch.zeros_like(v), rows)
    sampler_step(state, torch.cat([v, v], 1), pack(rows), 0, grad=torch.ones_like(v), impl=impl)
    truth = v.double().exp()
    relative = (state.x.double() / truth, v.exp().double() / truth, torch.ones_like(truth))
    assert_within(*relative, "e^v / e^v", precision=torch.float32)
    ends = torch.tensor([-math.inf, -1000, 200, math.inf, NAN]).view(1, 1, -1)
    state, zeros, ones = (
        SamplerState.start(torch.zeros_like(ends), rows),
        torch.zeros_like(ends),
        torch.ones_like(ends),
    )
    sampler_step(state, torch.cat([zeros, ends], 1), pack(rows), 0, grad=ones, impl=impl)
    assert state.x.flatten()[:4].tolist() == [0, 0, math.inf, math.inf] and state.x.isnan().flatten()[4]
