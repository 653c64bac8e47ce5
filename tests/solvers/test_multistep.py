"""Tests of the multistep solvers, of Heun and of churn that hold for every process."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from admfast.diffusion import DiffusionConfig, MeanType
from admfast.errors import InvalidArgument
from admfast.ops import Clip, SamplerState, pack, sampler_step
from admfast.ops.update import SolverTable
from admfast.solvers import ddim, deis, dpmpp, euler, heun, ipndm, list_solvers, make_solver, unipc
from admfast.solvers.solver import SOLVERS

NEW = sorted({"unipc", "dpmpp", "deis", "ipndm", "heun", "euler"})
# Of Gaussian data, for which a perfect network predicts x_0 = alpha STD^2 / (alpha^2 STD^2 + sigma^2) x.
STD = 0.5


def table(solver, count: int, clip: bool = True, **config) -> SolverTable:
    process = DiffusionConfig(steps=1000, **config).build(solver.respacing_for(count))
    return solver.table(process, clip)


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("steps", [1, 2, 5, 10])
def test_steps_are_evaluations_and_the_last_row_returns_x0(name, steps):
    solver = make_solver(name)
    rows = table(solver, steps).rows
    assert len(rows) == (steps if name != "heun" else steps - 1 + steps % 2)
    last = rows[-1]
    assert (last.a, last.a_s, last.b, last.c1, last.c2, last.c3, last.k_z) == (0, 0, 1, 0, 0, 0, 0)


@pytest.mark.parametrize("name", NEW)
def test_no_new_solver_reads_the_learned_variance(name):
    for row in table(make_solver(name), 9, learn_sigma=True).rows:
        assert row.l0 == row.l1 == row.k_mean == row.k_post == 0 and row.k_pre > 0


@pytest.mark.parametrize("name", NEW)
def test_guidance_enters_before_the_limit_as_a_change_of_eps(name):
    process = DiffusionConfig(steps=1000).build("uniform4")
    bars = dict(zip(process.schedule.timestep_map.tolist(), process.schedule.alphas_cumprod, strict=True))
    for row in make_solver(name).table(process).rows:
        bar = bars[int(row.t_net)]
        # eps becomes eps - sqrt(1 - bar) g, and x_0 = (x - sqrt(1 - bar) eps) / sqrt(bar).
        assert row.k_pre == pytest.approx((1 - bar) / math.sqrt(bar)) and row.clip == Clip.USED


@pytest.mark.parametrize(
    "solver", [dpmpp(order=1), unipc(order=1), deis(order=1), ipndm(order=1), euler()], ids=str
)
def test_order_1_is_ddim(solver):
    process = DiffusionConfig(steps=1000).build("uniform12")
    ours, expected = solver.table(process), ddim().table(process)
    columns = ("k_x", "k_out", "b", "a") if solver.name != "unipc" else ("k_x", "k_out")
    for row, other in zip(ours.rows, expected.rows, strict=True):
        for name in columns:
            assert getattr(row, name) == pytest.approx(getattr(other, name), rel=1e-9, abs=1e-12), name


@pytest.mark.parametrize("kind", list(MeanType), ids=lambda m: m.name)
@pytest.mark.parametrize("name", NEW)
def test_every_kind_of_network(name, kind):
    rows = table(make_solver(name), 6, mean_type=kind).rows
    # Their updates use x_0, whatever the network predicts.
    assert pack(rows).host.isfinite().all() and {row.clip for row in rows} == {Clip.USED}


def final_std(solver, count: int) -> float:
    """Return the standard deviation of the last x but one step, relative to the exact one, by linear rows."""
    process = DiffusionConfig(steps=1000).build(solver.respacing_for(count))
    rows = solver.table(process, clip=False).rows
    # Every value is a linear function of independent normals: x_T and the rows' noise.
    size = len(rows) + 1
    unit = torch.eye(size, dtype=torch.float64)
    x = unit[0] * solver.table(process, clip=False).noise_scale
    saved, pushed = torch.zeros_like(x), [torch.zeros_like(x)] * 3
    for i, row in enumerate(rows[:-1]):
        # The network: eps for Gaussian data, at the signal and noise of this row.
        alpha, sigma = 1 / row.k_x, -row.k_out / row.k_x
        eps = sigma / (alpha**2 * STD**2 + sigma**2) * x
        x0 = row.k_x * x + row.k_out * eps
        past = row.c1 * pushed[0] + row.c2 * pushed[1] + row.c3 * pushed[2]
        following = row.a * x + row.a_s * saved + row.b * x0 + past + row.k_z * unit[i + 1]
        saved = x if row.save else saved
        pushed = [row.p_x * x + row.p_0 * x0, *pushed[:2]] if row.pushes else pushed
        x = following
    alpha, sigma = 1 / rows[-1].k_x, -rows[-1].k_out / rows[-1].k_x
    return float(x.norm()) / math.hypot(alpha * STD, sigma)


@pytest.mark.parametrize(
    ("solver", "order"),
    [
        (dpmpp(order=1, sde=True), 1),
        (dpmpp(order=2, sde=True), 2),
        (euler(churn=40), 1),
        (heun(churn=40), 2),
        (heun(churn=40, churn_range=(0.05, 50)), 2),
    ],
    ids=str,
)
def test_with_noise_the_standard_deviation_of_gaussian_data_is_found(solver, order):
    errors = [abs(final_std(solver, count) - 1) for count in (160, 320)]
    assert round(math.log2(errors[0] / errors[1])) == order, errors


@pytest.mark.parametrize("churn", [2.0, 20.0])
@pytest.mark.parametrize("kind", [MeanType.EPSILON, MeanType.START_X], ids=lambda m: m.name)
@pytest.mark.parametrize("rescale", [False, True], ids=["", "rescaled"])
def test_churn_adds_noise_where_it_is_asked_for(churn, kind, rescale):
    solver = euler(churn=churn, churn_range=(0.1, 10), churn_noise=1.01)
    config = DiffusionConfig(steps=500, mean_type=kind, rescale_timesteps=rescale)
    process = config.build("karras20")
    made = solver.table(process)
    rho = process.schedule.sqrt_recipm1_alphas_cumprod[::-1]
    assert not made.integer_t and made.noise_scale == 1
    for before, row, at in zip(made.rows, made.rows[1:], rho[1:], strict=False):
        raised = 0.1 <= at <= 10
        factor = 1 + min(churn / 20, math.sqrt(2) - 1) if raised else 1.0
        alpha = 1 / math.hypot(1, factor * at)
        added = 1.01 * at * math.sqrt(factor**2 - 1) * alpha
        assert before.k_z == pytest.approx(added)
        reads = (1 / alpha, -factor * at) if kind is MeanType.EPSILON else (0, 1)
        assert (row.k_x, row.k_out) == pytest.approx(reads)
        timestep = process.schedule.timesteps_at(-2 * math.log(factor * at))
        assert row.t_net == row.t_clf == pytest.approx(float(timestep) * (2 if rescale else 1), rel=1e-6)
        assert row.timestep == (pytest.approx(float(timestep)) if raised else None)
    assert all(row.k_z == 0 for row in euler().table(process).rows)


def eps_of(y: torch.Tensor, rho: float) -> torch.Tensor:
    """Return eps at y = x / alpha, near that of Gaussian data."""
    return y * rho / (STD**2 + rho**2) + 0.1 * torch.sin(y)


def edm_ref(y: torch.Tensor, rho: list[float], noise: torch.Tensor, churn: float, second: bool):
    """Return the point before the last step by algorithm 2 of Karras et al. 2022, in its own variables."""
    for i in range(len(rho) - 2):
        gamma = min(churn / (len(rho) - 1), math.sqrt(2) - 1) if 0.1 <= rho[i] <= 10 else 0.0
        raised = (1 + gamma) * rho[i]
        y = y + math.sqrt(raised**2 - rho[i] ** 2) * 1.01 * noise[i]
        slope = eps_of(y, raised)
        following = y + (rho[i + 1] - raised) * slope
        if second:
            following = y + (rho[i + 1] - raised) * (slope + eps_of(following, rho[i + 1])) / 2
        y = following
    return y


@pytest.mark.parametrize("churn", [0.0, 4.0, 40.0])
@pytest.mark.parametrize("method", [euler, heun])
def test_churn_takes_the_steps_of_the_published_algorithm(method, churn):
    solver = method(churn=churn, churn_range=(0.1, 10), churn_noise=1.01)
    process = DiffusionConfig(steps=1000).build("karras12")
    rows = solver.table(process, clip=False).rows
    rho = [*process.schedule.sqrt_recipm1_alphas_cumprod[::-1].tolist(), 0.0]
    y, *noise = torch.randn((13, 9), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = edm_ref(y, rho, torch.stack(noise), churn, method is heun)
    state = SamplerState.start((y / rows[0].k_x)[:, None, None], rows)
    packed, evaluations = pack(rows, dtype=torch.float64), 2 if method is heun else 1
    for i, row in enumerate(rows[:-1]):
        eps = eps_of(state.x * row.k_x, -row.k_out)
        # The last row of a step adds the noise of the next.
        following = noise[min(i // evaluations + 1, 11)][:, None, None]
        sampler_step(state, eps, packed, i, noise=following, impl="reference")
    # Roundings of float64, amplified by coefficients of up to sigma / alpha = 157 in each of up to 23 rows.
    torch.testing.assert_close((state.x * rows[-1].k_x)[:, 0, 0], expected, rtol=1e-9, atol=1e-9)


def test_churn_at_the_first_node_is_part_of_the_starting_noise():
    process = DiffusionConfig(steps=1000).build([100, 400, 700])
    made = euler(churn=1.0, churn_noise=1.5).table(process)
    rho = float(process.schedule.sqrt_recipm1_alphas_cumprod[-1])
    alpha = [1 / math.hypot(1, factor * rho) for factor in (1, 4 / 3)]
    added = 1.5 * alpha[1] * rho * math.sqrt((4 / 3) ** 2 - 1)
    assert made.noise_scale == pytest.approx(math.hypot(alpha[1] / alpha[0], added))
    assert not made.integer_t and euler().table(process).integer_t


def test_churn_raises_no_node_above_the_process():
    # sigma / alpha of the last timestep is 157, that of 980 is 130, and churn multiplies by 4/3.
    process = DiffusionConfig(steps=1000).build([100, 940, 980])
    rows = euler(churn=1.0).table(process).rows
    assert rows[0].t_net == 980 and 940 < rows[1].t_net < 999


def test_options_of_a_cached_solver_can_not_be_changed():
    solver = make_solver("heun:churn_range=[0.05,50]")
    assert solver.options["churn_range"] == (0.05, 50.0) and make_solver(str(solver)) == solver


def test_the_last_steps_of_dpmpp_and_unipc_have_lower_orders():
    process = DiffusionConfig(steps=1000).build("uniform6")
    for solver, kept in ((dpmpp(order=3), [0, 1, 2, 2, 1, 0]), (deis(order=3), [0, 1, 2, 2, 2, 0])):
        rows = solver.table(process).rows
        assert [sum(c != 0 for c in (row.c1, row.c2, row.c3)) for row in rows] == kept
    # UniPC's corrector adds a value: that of the node it comes from.
    rows = unipc(order=3).table(process).rows
    assert [sum(c != 0 for c in (row.c1, row.c2, row.c3)) for row in rows] == [0, 1, 2, 3, 3, 0]


def taylor(h: float, power: int) -> float:
    """Return int_0^h e^(tau - h) tau^power d tau, the exact weight of a power of x_0's polynomial."""
    tau, w = np.polynomial.legendre.leggauss(40)
    tau, w = h * (tau + 1) / 2, h * w / 2
    return float((w * np.exp(tau - h) * tau**power).sum())


def row_at(solver, i: int):
    """Return row i of six, and the steps of lambda before and after it, and alpha of the next node."""
    process = DiffusionConfig(steps=1000).build("uniform6")
    lam = process.schedule.log_snr(np.arange(6))[::-1] / 2
    alpha = process.schedule.sqrt_alphas_cumprod[::-1]
    return solver.table(process).rows[i], lam - lam[i], alpha[i + 1]


def test_3m_is_the_published_formula():
    row, lam, alpha = row_at(dpmpp(order=3), 2)
    h, (t1, t2) = lam[3], lam[[1, 0]]
    # The parabola through the three values has all of its slope, and half of its curvature.
    for values in ([1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]):
        curvature, slope, constant = np.polyfit([0, t1, t2], values, 2)
        exact = constant * taylor(h, 0) + slope * taylor(h, 1) + curvature * taylor(h, 2) / 2
        found = np.dot(values, [row.b, row.c1, row.c2])
        assert found == pytest.approx(alpha * exact, rel=1e-9)


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_the_predictor_of_unipc_2_weighs_the_slope_by_half_of_b(variant):
    # The second row of a table has nothing to correct but x itself, by the first row's corrector of order 1.
    row, lam, alpha = row_at(unipc(order=2, variant=variant), 1)
    h, before = lam[2], -lam[0]
    b = h if variant == "bh1" else 1 - math.exp(-h)
    first, _, alpha_first = row_at(unipc(order=2, variant=variant), 0)
    corrector = alpha_first * (before if variant == "bh1" else 1 - math.exp(-before)) / 2
    slope = alpha * b * h / (2 * before)
    assert row.c1 == pytest.approx(-slope - row.a * corrector, rel=1e-9)
    assert row.b == pytest.approx(alpha * (1 - math.exp(-h)) + slope + row.a * corrector, rel=1e-9)
    assert first.c1 == 0


def test_the_weights_of_deis_are_exact_integrals():
    process = DiffusionConfig(steps=1000).build("uniform6")
    schedule = process.schedule
    row = deis(order=3).table(process).rows[2]
    t = schedule.timestep_map[::-1].astype(float)
    alpha, sigma = schedule.sqrt_alphas_cumprod[::-1], schedule.sqrt_one_minus_alphas_cumprod[::-1]
    grid = np.linspace(t[3], t[2], 200_001)
    rho = np.exp(-schedule.original.log_snr(grid) / 2)
    for j, name in enumerate(("", "c1", "c2")):
        known = [t[2], t[1], t[0]]
        values = np.prod([(grid - u) / (known[j] - u) for k, u in enumerate(known) if k != j], axis=0)
        trapezoids = (values[1:] + values[:-1]) / 2 * np.diff(rho)
        weight = -alpha[3] * trapezoids.sum()  # from the larger rho to the smaller
        found = -row.b * sigma[2] / alpha[2] if j == 0 else getattr(row, name)
        assert found == pytest.approx(weight, rel=1e-6)


def test_churn_is_refused_where_the_network_has_no_values_between_timesteps():
    with pytest.raises(InvalidArgument, match="^churn="):
        table(heun(churn=5), 9, mean_type="PREVIOUS_X")


@pytest.mark.parametrize(
    ("text", "argument"),
    [
        ("dpmpp:order=4", "order"),
        ("dpmpp:order=3,sde=true", "order"),
        ("dpmpp:sde=1", "sde"),
        ("unipc:order=0", "order"),
        ("unipc:variant=bh3", "variant"),
        ("deis:order=5", "order"),
        ("deis:variable=lambda", "variable"),
        ("ipndm:order=1.5", "order"),
        ("heun:churn=-1", "churn"),
        ("heun:churn_range=[2,1]", "churn_range"),
        ("euler:churn_noise=nan", "churn_noise"),
    ],
)
def test_wrong_options_are_named(text, argument):
    with pytest.raises(InvalidArgument, match=f"^{argument}="):
        make_solver(text)


@pytest.mark.parametrize("name", NEW)
def test_no_signal_at_the_start_is_refused(name):
    process = DiffusionConfig(steps=20).build("")
    with pytest.raises(InvalidArgument, match="alpha_bar is 0"):
        make_solver(name).table(process)


def test_every_solver_is_listed_with_its_options_and_has_a_spacing():
    assert set(NEW) < {text.partition(":")[0] for text in list_solvers("noise")}
    for make in SOLVERS.values():
        assert make_solver(str(make())) == make()
    assert [make_solver(name).respacing_for(9) for name in ("unipc", "heun", "euler")] == [
        "uniform9", "karras5", "karras9",
    ]  # fmt: skip
    assert (
        unipc().respacing_for(9, "log-snr") == "log-snr9" and ddim().respacing_for(9, "karras") == "karras9"
    )
