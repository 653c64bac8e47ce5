"""Tests of the solvers' tables against closed forms and against the formulas of the process."""

from __future__ import annotations

import dataclasses
import math
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from admfast.diffusion import GaussianDiffusion, MeanType, Schedule, VarType, make_schedule
from admfast.errors import InvalidArgument
from admfast.ops import Clip, Row, SamplerState, pack, sampler_step
from admfast.ops.update import SolverTable
from admfast.solvers import (
    SOLVERS,
    Solver,
    ddim,
    ddim_inverse,
    ddpm,
    list_solvers,
    make_solver,
    solver_options,
)
from tests.ops.tolerance import assert_same_formula
from tests.parity.golden import SCHEDULE_LIMIT, compare

SCHEDULES = {
    "linear-50": ("linear", 1000, "50", False),
    "linear-ddim25": ("linear", 1000, "ddim25", True),
    "cosine-20": ("cosine", 400, "20", False),
    "all-40": ("cosine", 40, "", False),
}
SHAPE = (2, 3, 4, 5)
PUBLISHED = ("ddpm", "ddim", "ddim-inverse")


@pytest.fixture(params=SCHEDULES, ids=str)
def schedule(request) -> Schedule:
    return make_schedule(*SCHEDULES[request.param])


def process(schedule: Schedule, mean: MeanType | str = "EPSILON", var: VarType | str = "FIXED_SMALL"):
    return GaussianDiffusion(schedule, mean, var)


def table_of(solver: str, diffusion: GaussianDiffusion, clip: bool = True, **options: float) -> SolverTable:
    """Return the table of a solver with these options."""
    return make_solver(solver, **options).table(diffusion, clip)


def given(seed: int, scale: float = 1.0) -> Tensor:
    """Return normal values that are exact in float32, so that float32 and float64 runs start equally."""
    return scale * torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def run(
    rows: tuple[Row, ...],
    model: Callable[[Tensor, Row], Tensor],
    x: Tensor,
    noise: Callable[[int], Tensor] | None = None,
    grad: Tensor | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Return (x, x0) after every row, in the dtype of x, by the update's reference."""
    state, table, after = SamplerState.start(x, rows), pack(rows, dtype=x.dtype), []
    for i, row in enumerate(rows):
        z = torch.zeros_like(x) if noise is None else noise(i).to(x.dtype)
        sampler_step(state, model(state.x, row), table, i, noise=z, grad=grad, impl="reference")
        after.append((state.x.clone(), state.x0.clone()))
    return after


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("var", list(VarType), ids=lambda v: v.name)
@pytest.mark.parametrize("mean", list(MeanType), ids=lambda m: m.name)
def test_a_ddpm_row_is_the_published_step(schedule, mean, var, clip):
    diffusion = process(schedule, mean, var)
    table = table_of("ddpm", diffusion, clip=clip)
    for i in (0, 1, schedule.num_timesteps // 2, schedule.num_timesteps - 1):
        (row,) = (row for row in table.rows if row.index == i)
        x, g, z = given(1, 1.3), given(3, 0.5), given(4)
        out = torch.cat([given(2), given(5, 0.6)], 1) if var.learned else given(2)
        t = torch.full((SHAPE[0],), i)

        def by_the_process(dtype: torch.dtype, x=x, out=out, g=g, z=z, t=t, i=i) -> Tensor:
            p = diffusion.p_mean_variance(out.to(dtype), x.to(dtype), t, clip_denoised=clip)
            mean = diffusion.condition_mean(p, g.to(dtype))
            return torch.stack([mean + (i > 0) * (0.5 * p.log_variance).exp() * z.to(dtype), p.pred_xstart])

        def by_the_row(dtype: torch.dtype, x=x, out=out, g=g, z=z, row=row) -> Tensor:
            (after,) = run((row,), lambda x, _: out.to(dtype), x.to(dtype), lambda _: z, g.to(dtype))
            return torch.stack(after)

        assert_same_formula(by_the_row, by_the_process, f"step {i}")


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("mean", list(MeanType), ids=lambda m: m.name)
def test_a_ddim_row_is_the_published_guided_step(schedule, mean, clip, eta):
    diffusion = process(schedule, mean, "LEARNED_RANGE")
    table = table_of("ddim", diffusion, eta=eta, clip=clip)
    bars, before = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    for i in (0, 1, schedule.num_timesteps // 2, schedule.num_timesteps - 1):
        (row,) = (row for row in table.rows if row.index == i)
        x, g, z, out = given(1, 1.3), given(3, 0.5), given(4), torch.cat([given(2), given(5)], 1)
        t, bar, bar_prev = torch.full((SHAPE[0],), i), bars[i], before[i]

        def by_the_process(
            dtype: torch.dtype, x=x, out=out, g=g, z=z, t=t, bar=bar, bar_prev=bar_prev
        ) -> Tensor:
            x, g, z = x.to(dtype), g.to(dtype), z.to(dtype)
            p = diffusion.p_mean_variance(out.to(dtype), x, t, clip_denoised=clip)
            p = diffusion.condition_score(p, g, x, t)
            eps = diffusion.predict_eps_from_xstart(x, t, p.pred_xstart)
            sigma = eta * math.sqrt((1 - bar_prev) / (1 - bar)) * math.sqrt(1 - bar / bar_prev)
            toward = math.sqrt(1 - bar_prev - sigma**2)
            x_prev = math.sqrt(bar_prev) * p.pred_xstart + toward * eps + (bar_prev < 1) * sigma * z
            return torch.stack([x_prev, p.pred_xstart])

        def by_the_row(dtype: torch.dtype, x=x, out=out, g=g, z=z, row=row) -> Tensor:
            (after,) = run((row,), lambda x, _: out.to(dtype), x.to(dtype), lambda _: z, g.to(dtype))
            return torch.stack(after)

        assert_same_formula(by_the_row, by_the_process, f"step {i}")


def test_rows_run_from_the_last_step_to_the_first_and_say_what_the_network_sees(schedule):
    diffusion = process(schedule)
    steps = list(range(schedule.num_timesteps))
    for table, order in (
        (table_of("ddpm", diffusion), steps[::-1]),
        (table_of("ddim", diffusion), steps[::-1]),
        (table_of("ddim-inverse", diffusion), steps),
    ):
        assert [row.index for row in table.rows] == order and len(table) == len(steps)
        assert [row.t_net for row in table.rows] == [schedule.model_t(i) for i in order]
        assert [row.t_clf for row in table.rows] == [row.t_net for row in table.rows]
        assert table.noise_scale == 1.0 and table.integer_t is not schedule.rescale_timesteps
        assert not any(row.save or row.pushes or row.a_s or row.c1 or row.mix for row in table.rows)


@pytest.mark.parametrize("mean", list(MeanType), ids=lambda m: m.name)
def test_what_is_limited(schedule, mean):
    diffusion = process(schedule, mean)
    follows_network = mean is MeanType.PREVIOUS_X
    for solver in PUBLISHED:
        clips = {row.clip for row in table_of(solver, diffusion).rows}
        assert clips == {Clip.REPORTED if follows_network and solver == "ddpm" else Clip.USED}
        assert {row.clip for row in table_of(solver, diffusion, clip=False).rows} == {Clip.NONE}


def test_noise_stops_at_the_last_row_and_guidance_does_not(schedule):
    table = table_of("ddpm", process(schedule, var="LEARNED_RANGE"))
    assert [row.k_z for row in table.rows] == [1.0] * (len(table) - 1) + [0.0]
    assert all(row.k_mean == 1 and row.k_post == row.k_pre == 0 for row in table.rows)
    table = table_of("ddim", process(schedule), eta=1.0)
    assert table.rows[-1].k_z == 0 and all(row.k_z > 0 for row in table.rows[:-1])
    assert all(row.k_mean == row.k_pre == 0 and row.k_post > 0 for row in table.rows)
    assert all(
        row.k_z == 0
        for row in (
            *table_of("ddim", process(schedule)).rows,
            *table_of("ddim-inverse", process(schedule)).rows,
        )
    )


def columns(table: SolverTable, *names: str) -> np.ndarray:
    """Return the fields of all rows, [names, rows], ordered by the step's index."""
    rows = sorted(table.rows, key=lambda row: row.index)
    return np.array([[getattr(row, name) for row in rows] for name in names])


def test_ddpm_coefficients_are_those_of_the_posterior(schedule):
    # q(x_{t-1} | x_t, x_0) by eq. 6 and 7 of Ho et al. 2020.
    bar = np.cumprod(1 - schedule.betas)
    prev, beta = np.append(1, bar[:-1]), schedule.betas
    of_x = np.sqrt(1 - beta) * (1 - prev) / (1 - bar)
    of_x0 = np.sqrt(prev) * beta / (1 - bar)
    compare(
        columns(table_of("ddpm", process(schedule)), "a", "b"),
        np.stack([of_x, of_x0]),
        SCHEDULE_LIMIT,
        "a, b",
    )
    variance = (1 - prev) / (1 - bar) * beta
    small, large = (
        columns(table_of("ddpm", process(schedule, var=v)), "l0")[0] for v in ("FIXED_SMALL", "FIXED_LARGE")
    )
    assert small[0] == -math.inf, "the posterior variance at t = 0 must be 0"
    compare(small[1:], np.log(variance[1:]), SCHEDULE_LIMIT, "small")
    compare(large, np.log(np.append(variance[1], beta[1:])), SCHEDULE_LIMIT, "large")
    l0, l1 = columns(table_of("ddpm", process(schedule, var="LEARNED_RANGE")), "l0", "l1")
    compare(l0 - l1, np.log(np.append(variance[1], variance[1:])), SCHEDULE_LIMIT, "v = -1")
    compare(l0 + l1, np.log(beta), SCHEDULE_LIMIT, "v = 1")
    learned = columns(table_of("ddpm", process(schedule, var="LEARNED")), "l0", "l1")
    assert (learned == [[0], [1]]).all()


def test_ddim_with_eta_1_is_ddpm(schedule):
    # Song et al. 2020, section 4.1: with eta = 1 the mean is the posterior's too.
    stochastic, ancestral = table_of("ddim", process(schedule), eta=1.0), table_of("ddpm", process(schedule))
    compare(columns(stochastic, "a", "b"), columns(ancestral, "a", "b"), SCHEDULE_LIMIT, "a, b")
    variance = columns(stochastic, "k_z")[0] ** 2
    compare(variance, schedule.posterior_variance, SCHEDULE_LIMIT, "variance")
    assert (columns(stochastic, "l0", "l1") == 0).all(), "k_z must be the whole sigma"


def test_ddim_with_half_eta_has_half_the_deviation(schedule):
    half, one = (columns(table_of("ddim", process(schedule), eta=eta), "k_z")[0] for eta in (0.5, 1.0))
    compare(2 * half, one, SCHEDULE_LIMIT, "sigma")


def test_steps_of_unit_normal_data_keep_it_unit_normal(schedule):
    # If x_0 ~ N(0, 1), every x_t ~ N(0, 1) and E[x_0 | x_t] = sqrt(ab) x_t. A DDIM step is then a rotation by
    # the difference of the angles arccos(sqrt(ab)), and a DDPM step with variance beta is exact.
    bar, prev = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    a, b = columns(table_of("ddim", process(schedule)), "a", "b")
    angles = np.arccos(np.sqrt(bar)) - np.arccos(np.sqrt(prev))
    compare(a + b * np.sqrt(bar), np.cos(angles), SCHEDULE_LIMIT, "ddim")
    a, b, l0 = columns(table_of("ddpm", process(schedule, var="FIXED_LARGE")), "a", "b", "l0")
    compare(a + b * np.sqrt(bar), np.sqrt(1 - schedule.betas), SCHEDULE_LIMIT, "ddpm mean")
    variance = (a + b * np.sqrt(bar)) ** 2 + np.exp(l0)
    compare(variance[1:], np.ones(len(bar) - 1), SCHEDULE_LIMIT, "ddpm variance")


POINT = torch.rand(SHAPE, generator=torch.Generator().manual_seed(7), dtype=torch.float64) * 1.6 - 0.8


def point_mass(schedule: Schedule, mean: MeanType) -> Callable[[Tensor, Row], Tensor]:
    """Return the exact network if all data are POINT: x = sqrt(ab) POINT + sqrt(1 - ab) eps."""

    def model(x: Tensor, row: Row) -> Tensor:
        bar = schedule.alphas_cumprod[row.index]
        if mean is MeanType.START_X:
            return POINT
        if mean is MeanType.EPSILON:
            return (x - math.sqrt(bar) * POINT) / math.sqrt(1 - bar)
        i = row.index
        return schedule.posterior_mean_coef1[i] * POINT + schedule.posterior_mean_coef2[i] * x

    return model


# A float64 trajectory may have the relative error of the schedule's coefficients, in which 1 - alpha_bar
# cancels. Four more roundings come from the first x_0, a difference of terms as large as x / sqrt(ab).
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("mean", list(MeanType), ids=lambda m: m.name)
def test_ddim_is_exact_on_one_point(schedule, mean, clip):
    # Every x_t is sqrt(ab) POINT + sqrt(1 - ab) eps, with the eps of the first x_t.
    table = table_of("ddim", process(schedule, mean), clip=clip)
    x_t, bar = given(9).double(), float(schedule.alphas_cumprod[-1])
    eps = (x_t - math.sqrt(bar) * POINT) / math.sqrt(1 - bar)
    terms = float(x_t.abs().max() / POINT.abs().max()) / math.sqrt(bar)
    limit = SCHEDULE_LIMIT + 4 * torch.finfo(torch.float64).eps * terms
    for row, (x, x0) in zip(table.rows, run(table.rows, point_mass(schedule, mean), x_t), strict=True):
        level = float(schedule.alphas_cumprod_prev[row.index])
        on_the_way = math.sqrt(level) * POINT + math.sqrt(1 - level) * eps
        compare(x, on_the_way, limit, f"x after step {row.index}")
        compare(x0, POINT, limit, f"x_0 at step {row.index}")


def test_ddpm_ends_in_the_point_with_any_noise(schedule):
    table = table_of("ddpm", process(schedule))
    noise = [given(20 + i) for i in range(len(table))]
    model = point_mass(schedule, MeanType.EPSILON)
    compare(run(table.rows, model, given(9).double(), noise.__getitem__)[-1][0], POINT, SCHEDULE_LIMIT, "x_0")


def test_ddim_inverse_goes_back_the_way_ddim_came(schedule):
    # Run DDIM down to the lowest noise level, then back up. DDIM's last row, which removes all noise and
    # can't be inverted, is left out.
    diffusion, model, x_t = process(schedule), point_mass(schedule, MeanType.EPSILON), given(9).double()
    down, up = table_of("ddim", diffusion).rows, table_of("ddim-inverse", diffusion).rows
    lowest = run(down[:-1], model, x_t)[-1][0]
    compare(run(up[:-1], model, lowest)[-1][0], x_t, SCHEDULE_LIMIT, "x_T")
    # The last row of the inverse ends without signal, at eps.
    bar = float(schedule.alphas_cumprod[-1])
    eps = (x_t - math.sqrt(bar) * POINT) / math.sqrt(1 - bar)
    compare(run(up[-1:], model, x_t)[0][0], eps, SCHEDULE_LIMIT, "eps")


def test_ddim_follows_the_flow_of_a_gaussian_to_first_order():
    # For data N(0.3, 0.25), the flow of DDIM maps x_T to m + (x_T - sqrt(ab) m) s / deviation_T.
    m, s = 0.3, 0.5
    full = make_schedule("linear", 4000)
    errors = []
    for steps in (100, 200, 400):
        # All schedules end at the same noise level, so only the number of steps differs.
        schedule = full.respaced([*range(4000 // steps - 1, 4000, 4000 // steps)])

        def model(x: Tensor, row: Row, schedule: Schedule = schedule) -> Tensor:
            bar = schedule.alphas_cumprod[row.index]
            return (x - math.sqrt(bar) * m) * math.sqrt(1 - bar) / (bar * s**2 + 1 - bar)

        bar = schedule.alphas_cumprod[-1]
        x = torch.linspace(-3, 3, 13, dtype=torch.float64).view(1, 1, 13)
        truth = m + (x - math.sqrt(bar) * m) * s / math.sqrt(bar * s**2 + 1 - bar)
        got = run(table_of("ddim", process(schedule), clip=False).rows, model, x)[-1][0]
        errors.append(float((got - truth).abs().max()))
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    # The order is 1 up to the next term of the error, which halves from one pair to the next.
    assert abs(orders[1] - 1) < abs(orders[0] - 1) < 0.5 and errors[-1] < errors[0] / 3, (errors, orders)


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_the_table_of_the_first_steps_is_the_end_of_the_table(schedule, solver):
    diffusion = process(schedule)
    middle = schedule.num_timesteps // 2
    whole, rest = table_of(solver, diffusion).rows, table_of(solver, diffusion.first_steps(middle)).rows
    assert [row.index for row in rest] == list(reversed(range(middle)))
    expected = pack(whole[-middle:]).host
    # The betas are computed again from alpha_bar, which is rounded.
    assert torch.allclose(pack(rest).host, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("solver", PUBLISHED)
def test_no_signal_at_the_end_is_refused(solver):
    # The last beta of a linear schedule of 20 steps is 1, so alpha_bar is 0 and x_0 can't be told from x.
    schedule = make_schedule("linear", 20)
    assert schedule.alphas_cumprod[-1] == 0
    with pytest.raises(InvalidArgument, match=rf"^{solver}: row \d+ \(step 19\) .*alpha_bar is 0"):
        table_of(solver, process(schedule))
    # If the network predicts x_0 itself, the ancestral step needs no division.
    assert len(table_of("ddpm", process(schedule, "START_X"))) == 20


def test_a_row_that_is_not_finite_is_refused_but_for_a_variance_of_zero():
    SolverTable("mine", (Row(0, 0, l0=-math.inf),))
    for field in ("k_x", "a", "t_net", "l1"):
        for value in (math.nan, math.inf):
            row = dataclasses.replace(Row(0, 0, index=3), **{field: value})
            with pytest.raises(InvalidArgument, match=rf"^mine: row 1 \(step 3\) has {field}="):
                SolverTable("mine", (Row(0, 0), row))
    with pytest.raises(InvalidArgument, match="has l0=nan"):
        SolverTable("mine", (Row(0, 0, l0=math.nan),))


def test_one_step_is_a_table():
    schedule = make_schedule("cosine", 1000, [500])
    for solver in PUBLISHED:
        for var in VarType:
            (row,) = table_of(solver, process(schedule, var=var)).rows
            assert row.k_z == 0 and row.index == 0
            if solver != "ddim-inverse":
                assert (row.a, row.b) == (0, 1), "the only step must give x_0"


def test_a_solver_is_a_value_and_a_text():
    assert (
        ddim(eta=0.5)
        == make_solver("ddim:eta=0.5")
        == make_solver("ddim", eta=0.5)
        == make_solver(ddim(eta=0.5))
    )
    assert str(ddim(eta=0.5)) == "ddim:eta=0.5" and hash(ddim(eta=0.5)) == hash(make_solver("ddim:eta=0.5"))
    assert ddim() != ddim(eta=0.5) != ddpm() and ddim() == make_solver(" ddim : eta = 0 ")
    for name, make in SOLVERS.items():
        assert (
            isinstance(make(), Solver)
            and make().name == name
            and set(make().options) == set(solver_options(name))
        )
        assert make_solver(str(make())) == make() == pickle.loads(pickle.dumps(make()))
    assert [make().starts_from for make in (ddpm, ddim, ddim_inverse)] == ["noise", "noise", "image"]


def test_every_solver_is_listed_with_its_options():
    assert set(list_solvers()) == {str(make()) for make in SOLVERS.values()} > {"ddpm", "ddim:eta=0.0"}
    for begins in ("noise", "image"):
        assert set(list_solvers(begins)) == {
            str(s) for s in (m() for m in SOLVERS.values()) if s.starts_from == begins
        }
    with pytest.raises(InvalidArgument, match="^solver='dimm': .*ddim:eta="):
        make_solver("dimm")


@pytest.mark.parametrize(
    "given, argument",
    [
        (("ddim", {"etta": 1}), "etta=1"),
        (("ddim:etta=1", {}), "etta=1"),
        (("ddpm", {"eta": 0}), "eta=0"),
        (("ddim-inverse:eta=0", {}), "eta=0"),
        (("ddim:eta", {}), "solver='ddim:eta'"),
        (("ddim:eta=much", {}), "eta='much'"),
        (("", {}), "solver=''"),
        ((3, {}), "solver=3"),
    ],
)
def test_wrong_solvers_and_options_are_named(given, argument):
    with pytest.raises(InvalidArgument, match=f"^{argument}: "):
        make_solver(given[0], **given[1])


@pytest.mark.parametrize("eta", [-0.1, 1.01, math.nan])
def test_eta_has_a_range(eta):
    with pytest.raises(InvalidArgument, match="^eta="):
        ddim(eta=eta)


def test_published_respacing():
    assert [make().respacing_for(25) for make in (ddpm, ddim, ddim_inverse)] == ["25", "ddim25", "ddim25"]
