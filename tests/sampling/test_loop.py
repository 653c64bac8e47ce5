"""Tests of the loop over a solver's rows: calls of model, guidance and callback, noise, and divergence."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from admfast.diffusion import DiffusionConfig
from admfast.errors import InvalidArgument, NonFiniteError
from admfast.ops.update import Clip, Stream, as_seeds, normal
from admfast.sampling import loop
from admfast.sampling.loop import Diverged, Progress
from admfast.solvers import ddim, make_solver, unipc
from tests.small import pipeline, randn, run_table

SHAPE = (2, 3, 4, 4)
X, SEEDS = randn(*SHAPE), as_seeds([5, 2**64 - 1])


def table(solver: str = "ddpm", steps: int = 5, process: DiffusionConfig | None = None, **options):
    process = process or DiffusionConfig(learn_sigma=True)
    respacing = str(steps) if solver == "ddpm" else f"ddim{steps}"
    return make_solver(solver).table(process.build(respacing), **options)


def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Return mean and variance channels that depend on x and t."""
    u = t.to(x.dtype).view(-1, 1, 1, 1) / 1000
    return torch.cat([torch.tanh(x + u), 0.5 * torch.cos(x - u)], dim=1)


def run(solver_table, network=model, x=X, **options):
    return run_table(solver_table, network, x, **{"seeds": SEEDS, **options})


# Callbacks


@pytest.mark.parametrize(
    "every, done",
    [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (3, [3, 5]), (5, [5]), (99, [5])],
)
def test_callback_comes_after_every_so_many_rows_and_the_last(every, done):
    seen: list[Progress] = []
    state = run(table(), callback=seen.append, every=every)
    assert [progress.done for progress in seen] == done
    assert {progress.total for progress in seen} == {5}
    assert seen[-1].x is state.x and seen[-1].x0 is state.x0
    assert (seen[-1].first, seen[-1].stage) == (0, "base")


def test_callback_sees_the_rows_in_order_and_the_state_after_each():
    seen, inputs = [], []

    def watched(x, t):
        inputs.append((x.clone(), t.clone()))
        return model(x, t)

    rows = table()
    keep = lambda p: seen.append((p.index, p.t, p.x.clone(), p.x0.clone()))  # noqa: E731
    state = run(rows, watched, callback=keep)
    assert [index for index, *_ in seen] == [4, 3, 2, 1, 0]
    assert [t for _, t, *_ in seen] == [row.t_net for row in rows.rows] == [999, 749, 500, 250, 0]
    for (x_in, t_in), (_, t, *_), row in zip(inputs, seen, rows.rows, strict=True):
        assert t_in.dtype == torch.int64 and t_in.tolist() == [row.t_net] * 2 == [t] * 2
        assert x_in.shape == SHAPE
    assert torch.equal(inputs[0][0], X)
    for (_, _, x_after, _), (x_next, _) in zip(seen, inputs[1:], strict=False):
        assert torch.equal(x_after, x_next)
    assert torch.equal(seen[-1][2], state.x)
    assert all(float(x0.abs().max()) <= 1 for *_, x0 in seen), "the reported x_0 must be clipped"


def test_rescaled_processes_show_the_network_float_timesteps():
    process = DiffusionConfig(learn_sigma=True, steps=100, rescale_timesteps=True)
    seen = []
    run(table(process=process), lambda x, t: (seen.append(t), model(x, t))[1])
    assert {t.dtype for t in seen} == {torch.float32}
    assert seen[0].tolist() == [990.0, 990.0]


def test_a_callback_s_exception_passes_and_x_stays_the_caller_s():
    def stop(progress: Progress) -> None:
        if progress.done == 2:
            raise KeyboardInterrupt

    before = X.clone()
    with pytest.raises(KeyboardInterrupt):
        run(table(), callback=stop)
    assert torch.equal(X, before)


# Noise


def test_noise_is_that_of_seed_stream_and_row():
    rows = table()
    recorded = torch.stack([normal(SEEDS, SHAPE[1:], row, Stream.UPSAMPLER_STEPS) for row in range(7, 12)])
    by_seed = run(rows, noise_row=7, stream=Stream.UPSAMPLER_STEPS)
    given = run(rows, step_noise=recorded, seeds=None)
    assert torch.equal(by_seed.x, given.x)
    assert not torch.equal(run(rows).x, given.x)


def test_recorded_noise_must_fit():
    with pytest.raises(InvalidArgument, match=r"step_noise.shape=\(4, 2, 3, 4, 4\): \(5, 2, 3, 4, 4\)"):
        run(table(), step_noise=randn(4, *SHAPE))


# Guidance


@pytest.mark.parametrize("clip", [True, False], ids=["clipped", "free"])
def test_guidance_moves_the_mean_by_variance_times_gradient(clip):
    rows, seen = table(steps=2, clip=clip), []

    def gradient(x, t):
        assert not torch.is_grad_enabled() and not x.requires_grad
        seen.append((x.clone(), t.tolist()))
        return torch.full_like(x, 0.25)

    found = []
    for guide in (None, gradient):
        keep = lambda p: found.append((p.x.clone(), p.x0.clone()))  # noqa: E731
        run(rows, guidance=guide, step_noise=torch.zeros(2, *SHAPE), callback=keep)
    (plain, plain_x0), (guided, guided_x0) = found[0], found[2]
    row, v = rows.rows[0], model(X, torch.tensor([999, 999]))[:, 3:]
    variance = torch.exp(row.l0 + row.l1 * v)
    # Guidance adds one product and one sum, which round numbers below 2^9.
    torch.testing.assert_close(guided, plain + variance * 0.25, rtol=0, atol=2.0 ** (9 - 23))
    assert torch.equal(guided_x0, plain_x0), "guidance changed the reported x_0"
    assert torch.equal(seen[0][0], X)
    assert [t for _, t in seen] == [[row.t_clf] * 2 for row in rows.rows]


def test_guidance_of_a_wrong_shape_is_named():
    with pytest.raises(InvalidArgument, match=r"guidance\(x, t\).shape=\(2, 3, 4\): \(2, 3, 4, 4\)"):
        run(table(), guidance=lambda x, t: x[..., 0])


def test_guidance_may_make_its_x_a_leaf():
    def gradient(x, t):
        with torch.enable_grad():
            x.requires_grad_(True)
            return torch.autograd.grad(-x.square().sum(), x)[0]

    state = run(table(), guidance=gradient)
    assert not state.x.requires_grad and not state.x0.requires_grad
    assert torch.equal(state.x, run(table(), guidance=lambda x, t: -2 * x).x)


# denoised_fn


def test_denoised_fn_maps_x0_before_the_limit():
    rows, seen, reported = table(), [], []

    def halved(x0):
        seen.append(x0.clone())
        return x0 / 2

    run(rows, denoised_fn=halved, callback=lambda p: reported.append(p.x0.clone()))
    assert len(seen) == 5 and float(seen[0].abs().max()) > 2, "the first x_0 should be far outside [-1, 1]"
    for x0, limited in zip(seen, reported, strict=True):
        assert torch.equal(limited, (x0 / 2).clamp(-1, 1))


def test_the_identity_as_denoised_fn_changes_rounding_alone():
    plain, mapped = run(table()), run(table(), denoised_fn=lambda x0: x0)
    # x_0 is rounded to float32 once more, and 1/sqrt(alpha_bar) is 157 at the first step.
    torch.testing.assert_close(mapped.x, plain.x, rtol=0, atol=157 * 2**-21)


def test_denoised_fn_of_a_wrong_shape_is_named():
    with pytest.raises(InvalidArgument, match=r"denoised_fn\(x_0\).shape=\(1, 3, 4, 4\): \(2, 3, 4, 4\)"):
        run(table(), denoised_fn=lambda x0: x0[:1])


def test_denoised_fn_is_refused_where_the_update_ignores_x0():
    process = DiffusionConfig(mean_type="PREVIOUS_X", var_type="LEARNED_RANGE")
    rows = table(process=process)
    assert rows.rows[0].clip == Clip.REPORTED
    with pytest.raises(
        InvalidArgument, match="denoised_fn='given': not for a network that predicts the prev"
    ):
        run(rows, denoised_fn=lambda x0: x0)
    assert run(rows).x.isfinite().all()


# dynamic_threshold


@pytest.mark.parametrize("guided", [False, True], ids=["unguided", "guided"])
@pytest.mark.parametrize("halves", [False, True], ids=["alone", "after denoised_fn"])
def test_a_dynamic_threshold_limits_the_guided_x0_of_each_image(guided, halves):
    process = DiffusionConfig(learn_sigma=True).build("uniform3")
    rows = unipc().table(process, clip=False)
    row, found = rows.rows[0], []
    gradient = torch.full_like(X, 0.3)
    gradient[1] = -2.0
    run_table(
        rows,
        model,
        X,
        guidance=(lambda x, t: gradient) if guided else None,
        denoised_fn=(lambda x0: x0 / 2) if halves else None,
        dynamic_threshold=0.9,
        callback=lambda p: found.append(p.x0.clone()),
    )
    x0 = row.k_x * X.double() + row.k_out * model(X, torch.tensor([999, 999]))[:, :3].double()
    x0 = x0 / 2 if halves else x0
    x0 = x0 + row.k_pre * gradient if guided else x0
    for image, expected in zip(found[0], x0, strict=True):
        s = max(float(np.quantile(expected.abs().numpy(), 0.9)), 1.0)
        limited = expected.clamp(-s, s) / s
        # x_0 is rounded a few times in float32, and |k_x| and |k_out| are 157.
        assert float((image - limited).abs().max()) < 157 * 2**-21
        assert s > 2 and float(image.abs().max()) == 1.0


def test_a_dynamic_threshold_below_one_leaves_x0():
    rows = ddim().table(DiffusionConfig().build("uniform3"), clip=False)
    small = lambda x, t: x - 0.01 * x  # noqa: E731
    plain = run_table(rows, small, X / 1000)
    limited = run_table(rows, small, X / 1000, dynamic_threshold=1.0)
    torch.testing.assert_close(limited.x, plain.x, rtol=0, atol=157 * 2**-21)


# Divergence


def fails_at(t_bad: int, value: float = float("nan")):
    """Return the model, but with one value replaced at timestep `t_bad`."""

    def network(x, t):
        out = model(x, t).clone()
        if int(t[0]) == t_bad:
            out[1, 2, 3, 3] = value
        return out

    return network


@pytest.mark.parametrize("index, t", [(4, 999), (2, 500), (0, 0)])
def test_divergence_names_the_step_and_keeps_what_went_into_it(index, t):
    states = []
    good = run(table(), callback=lambda p: states.append(p.x.clone()))
    with pytest.raises(Diverged, match=rf"x is not finite after step {index} \(t = {t}\)") as caught:
        run(table(), fails_at(t))
    assert isinstance(caught.value, NonFiniteError) and caught.value.t.tolist() == [t, t]
    assert torch.equal(caught.value.x, X if index == 4 else states[3 - index])
    assert good.x.isfinite().all()


def test_running_again_finds_the_row(monkeypatch):
    """On a GPU only the first and the last row are checked, so the loop runs again to find the bad row."""
    pipe, real = pipeline(classifier=None, guidance=0.0), loop.run_rows

    def careless(rows, step, plan=None, check_every_row=False, **noted):
        try:
            return real(rows, step, plan, check_every_row, **noted)
        except Diverged as error:
            if not check_every_row:
                error.x = None
            raise

    monkeypatch.setattr(loop, "run_rows", careless)
    bad = lambda x0: torch.full_like(x0, float("nan"))  # noqa: E731
    with pytest.raises(NonFiniteError, match="after step 3 .*denoised_fn"):
        pipe.sample(0, 0, denoised_fn=bad)
    calls: list[int] = []
    once = lambda x0: bad(x0) if not calls and not calls.append(1) else x0  # noqa: E731
    with pytest.raises(NonFiniteError, match="check the device"):
        pipe.sample(0, 0, denoised_fn=once)


def test_float64_runs_on_the_reference():
    state = run(table(), x=X.double(), impl="reference")
    assert state.x.dtype == torch.float64
    # Errors of float32 coefficients and arithmetic, multiplied by 1/sqrt(alpha_bar) = 157 at the first step.
    torch.testing.assert_close(run(table()).x.double(), state.x, rtol=0, atol=157 * 2**-20)
