"""Tests of the process against closed forms in float64, and of its coefficients on the device."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from admfast.diffusion import GaussianDiffusion, LossType, MeanType, Schedule, VarType, make_schedule
from admfast.errors import InvalidArgument

SHAPE = (5, 3, 4, 7)
STEPS = torch.tensor([0, 1, 7, 18, 19])


def process(mean="EPSILON", var="LEARNED_RANGE", respacing="20", **kwargs) -> GaussianDiffusion:
    return GaussianDiffusion(make_schedule("linear", 1000, respacing, **kwargs), mean, var)


def images(count: int, dtype=torch.float64, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator, dtype=dtype) for _ in range(count)]


def column(values: np.ndarray, t: torch.Tensor = STEPS) -> torch.Tensor:
    return torch.tensor(values)[t].view(-1, 1, 1, 1)


def close(actual: torch.Tensor, expected: torch.Tensor, rtol: float = 1e-11) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual, expected.expand_as(actual), rtol=0, atol=rtol * max(scale, 1.0))


def test_marginals_follow_from_the_single_steps():
    """From x_0: mean_t = sqrt(1 - beta_t) mean_{t-1}, var_t = (1 - beta_t) var_{t-1} + beta_t."""
    d = process()
    (x_start,) = images(1)
    mean, variance = x_start, torch.zeros(1, dtype=torch.float64)
    for step, beta in enumerate(d.schedule.betas):
        mean, variance = float(np.sqrt(1 - beta)) * mean, (1 - beta) * variance + beta
        q = d.q_mean_variance(x_start, torch.full((5,), step))
        close(q.mean, mean)
        close(q.variance, variance)
        close(q.log_variance, variance.log(), 1e-9)
        assert q.variance.shape == q.log_variance.shape == SHAPE


def test_q_sample_is_mean_plus_deviation_times_noise():
    d = process()
    x_start, noise = images(2)
    q = d.q_mean_variance(x_start, STEPS)
    close(d.q_sample(x_start, STEPS, noise), q.mean + q.variance.sqrt() * noise)


def test_q_sample_statistics():
    """Over 200 000 draws the mean and the deviation are those of q, within five standard errors."""
    d, n = process(), 200_000
    t = torch.full((1,), 9)
    noise = torch.randn(1, n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x_t = d.q_sample(torch.full((1, n), 0.7, dtype=torch.float64), t, noise)
    bar = d.schedule.alphas_cumprod[9]
    deviation = float(np.sqrt(1 - bar))
    assert float(x_t.mean()) == pytest.approx(0.7 * np.sqrt(bar), abs=5 * deviation / np.sqrt(n))
    assert float(x_t.std()) == pytest.approx(deviation, abs=5 * deviation / np.sqrt(2 * n))


def test_posterior_is_bayes():
    d = process()
    x_start, x_t = images(2)
    t = STEPS.clamp(min=1)
    s = d.schedule
    beta, prev = column(s.betas, t), column(s.alphas_cumprod_prev, t)
    precision = (1 - beta) / beta + 1 / (1 - prev)
    information = (1 - beta).sqrt() / beta * x_t + prev.sqrt() / (1 - prev) * x_start
    posterior = d.q_posterior(x_start, x_t, t)
    close(posterior.mean, information / precision, 1e-10)
    close(posterior.variance, 1 / precision, 1e-10)
    close(posterior.log_variance, -precision.log(), 1e-10)


def test_posterior_at_zero_is_x_start():
    d = process()
    x_start, x_t = images(2)
    zero = torch.zeros(5, dtype=torch.int64)
    posterior = d.q_posterior(x_start, x_t, zero)
    close(posterior.mean, x_start)
    assert not posterior.variance.any()
    close(posterior.log_variance, torch.tensor(d.schedule.posterior_variance[1]).log())


def test_predictions_invert_each_other():
    d = process()
    x_start, noise = images(2)
    x_t = d.q_sample(x_start, STEPS, noise)
    close(d.predict_xstart_from_eps(x_t, STEPS, noise), x_start, 1e-10)
    close(d.predict_eps_from_xstart(x_t, STEPS, x_start), noise, 1e-10)
    x_prev = d.q_posterior(x_start, x_t, STEPS).mean
    close(d.predict_xstart_from_xprev(x_t, STEPS, x_prev), x_start, 1e-10)


@pytest.mark.parametrize("mean", list(MeanType), ids=lambda m: m.name)
def test_the_right_output_gives_the_posterior(mean):
    """A network with the exact prediction gives q(x_{t-1} | x_t, x_0), for every mean_type."""
    d = process(mean, "FIXED_SMALL")
    x_start, noise = images(2)
    x_t = d.q_sample(x_start, STEPS, noise)
    posterior = d.q_posterior(x_start, x_t, STEPS)
    output = {MeanType.EPSILON: noise, MeanType.START_X: x_start, MeanType.PREVIOUS_X: posterior.mean}[mean]
    p = d.p_mean_variance(output, x_t, STEPS, clip_denoised=False)
    close(p.pred_xstart, x_start, 1e-10)
    close(p.mean, posterior.mean, 1e-10)
    close(p.variance, posterior.variance)
    close(p.log_variance, posterior.log_variance)


@pytest.mark.parametrize("mean", list(MeanType), ids=lambda m: m.name)
def test_clip_and_denoised_fn(mean):
    d = process(mean, "FIXED_LARGE")
    output, x_t = images(2)
    plain = d.p_mean_variance(output, x_t, STEPS, clip_denoised=False)
    for clip, fn in itertools.product((False, True), (None, lambda x: 0.3 * x + 0.1)):
        p = d.p_mean_variance(output, x_t, STEPS, clip_denoised=clip, denoised_fn=fn)
        expected = plain.pred_xstart if fn is None else fn(plain.pred_xstart)
        expected = expected.clamp(-1, 1) if clip else expected
        close(p.pred_xstart, expected)
        previous_x = mean is MeanType.PREVIOUS_X
        close(p.mean, output if previous_x else d.q_posterior(expected, x_t, STEPS).mean)


@pytest.mark.parametrize("var", list(VarType), ids=lambda v: v.name)
def test_variances(var):
    d = process(var=var)
    s = d.schedule
    mean_part, x_t, v = images(3)
    v = 2 * v  # far outside [-1, 1]: the fraction is not limited
    output = torch.cat([mean_part, v], dim=1) if var.learned else mean_part
    p = d.p_mean_variance(output, x_t, STEPS)
    small, large = s.posterior_log_variance_clipped, np.log(s.betas)
    if var is VarType.LEARNED_RANGE:
        expected = column(small) + (v + 1) / 2 * (column(large) - column(small))
    elif var is VarType.LEARNED:
        expected = v
    elif var is VarType.FIXED_LARGE:
        expected = column(np.append(small[0], large[1:]))
    else:
        expected = column(small)
    close(p.log_variance, expected)
    variance = column(s.posterior_variance) if var is VarType.FIXED_SMALL else expected.exp()
    torch.testing.assert_close(p.variance, variance.expand(SHAPE), rtol=1e-11, atol=0)
    assert p.variance.shape == p.log_variance.shape == SHAPE


def test_condition_mean():
    d = process(var="FIXED_LARGE")
    output, x_t, gradient = images(3)
    p = d.p_mean_variance(output, x_t, STEPS)
    close(d.condition_mean(p, gradient), p.mean + p.log_variance.exp() * gradient)
    fixed_small = process(var="FIXED_SMALL").p_mean_variance(output, x_t, STEPS)
    guided = d.condition_mean(fixed_small, gradient)
    assert torch.equal(guided[0], fixed_small.mean[0]) and not torch.equal(guided[1], fixed_small.mean[1])


def test_condition_score_moves_x_start_by_the_scaled_gradient():
    """eps - sqrt(1 - bar) g gives x_0 + (1 - bar) / sqrt(bar) g, which isn't clipped again."""
    d = process(var="FIXED_LARGE")
    output, x_t, gradient = images(3)
    p = d.p_mean_variance(output, x_t, STEPS)
    bar = column(d.schedule.alphas_cumprod)
    guided = d.condition_score(p, gradient, x_t, STEPS)
    close(guided.pred_xstart, p.pred_xstart + (1 - bar) / bar.sqrt() * gradient, 1e-10)
    close(guided.mean, d.q_posterior(guided.pred_xstart, x_t, STEPS).mean)
    assert float(guided.pred_xstart.abs().max()) > 1
    assert guided.variance is p.variance and guided.log_variance is p.log_variance


@pytest.mark.parametrize("mean", list(MeanType), ids=lambda m: m.name)
@pytest.mark.parametrize("var", list(VarType), ids=lambda v: v.name)
def test_float32_is_float64_rounded(mean, var):
    d = process(mean, var)
    mean_part, x_t, v = images(3)
    mean_part, x_t, v = mean_part.float(), x_t.float(), v.float().tanh()
    output = torch.cat([mean_part, v], dim=1) if var.learned else mean_part
    narrow = d.p_mean_variance(output, x_t, STEPS)
    wide = d.p_mean_variance(output.double(), x_t.double(), STEPS)
    for name, value in vars(narrow).items():
        expected = getattr(wide, name)
        assert value.dtype == torch.float32 and expected.dtype == torch.float64
        # Before clipping, x_0 is a difference of terms 150 times larger, whose ulp is 1e-5.
        assert float((value - expected).abs().max()) < 1e-4 * max(1.0, float(expected.abs().max())), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_output_is_computed_in_float32(dtype):
    d = process()
    output, x_t, v = images(3, torch.float32)
    half = torch.cat([output, v.tanh()], dim=1).to(dtype)
    p, expected = d.p_mean_variance(half, x_t, STEPS), d.p_mean_variance(half.float(), x_t, STEPS)
    for name, value in vars(p).items():
        assert value.dtype == torch.float32 and torch.equal(value, getattr(expected, name)), name
    assert d.condition_mean(p, x_t.to(dtype)).dtype == torch.float32
    assert d.condition_score(p, x_t.to(dtype), x_t, STEPS).mean.dtype == torch.float32


def test_tables_hold_the_float64_schedule_rounded_once():
    d = process()
    ones = torch.ones(20, 1, dtype=torch.float64)
    every = torch.arange(20)
    bar = torch.tensor(d.schedule.sqrt_alphas_cumprod).view(-1, 1)
    assert torch.equal(d.q_mean_variance(ones, every).mean, bar)
    assert torch.equal(d.q_mean_variance(ones.float(), every).mean, bar.float())


def test_tables_are_uploaded_once(monkeypatch):
    d = process()
    output, x_t, v = images(3, torch.float32)
    output = torch.cat([output, v], dim=1)

    def step():
        p = d.p_mean_variance(output, x_t, STEPS)
        d.condition_score(p, x_t, x_t, STEPS)
        d.model_t(STEPS)

    step()

    def refuse(*args, **kwargs):
        raise AssertionError("a tensor was made from host data")

    for function in ("tensor", "from_numpy", "as_tensor"):
        monkeypatch.setattr(torch, function, refuse)
    step()


def test_tables_made_under_inference_mode_serve_autograd():
    d = process(var="FIXED_LARGE")
    output, x_t = images(2, torch.float32)
    with torch.inference_mode():
        d.p_mean_variance(output, x_t, STEPS)
        d.model_t(STEPS)
    x = x_t.clone().requires_grad_()
    d.p_mean_variance(output, x, STEPS, clip_denoised=False).mean.sum().backward()
    assert x.grad is not None and x.grad.abs().min() > 0


@pytest.mark.parametrize("mean", list(MeanType), ids=lambda m: m.name)
def test_it_differentiates(mean):
    d = process(mean)
    output, x_t, v = (image[:, :1, :2, :2].clone().requires_grad_() for image in images(3))

    def outputs(output, v, x_t):
        p = d.p_mean_variance(torch.cat([output, v], dim=1), x_t, STEPS, clip_denoised=False)
        guided = d.condition_score(p, torch.sin(x_t), x_t, STEPS)
        return p.mean, p.log_variance, p.pred_xstart, d.condition_mean(p, x_t), guided.mean

    assert torch.autograd.gradcheck(outputs, (output, v, x_t))


def test_the_t_that_the_network_sees():
    d = process(respacing="ddim20")
    assert torch.equal(d.model_t(STEPS), 50 * STEPS) and d.model_t(STEPS).dtype == torch.int64
    scaled = GaussianDiffusion(make_schedule("cosine", 400, "ddim20", rescale_timesteps=True))
    assert torch.equal(scaled.model_t(STEPS), 50.0 * STEPS) and scaled.model_t(STEPS).dtype == torch.float32
    assert torch.equal(d.model_t(STEPS.int()), 50 * STEPS)


def test_types_are_members_or_their_names():
    d = GaussianDiffusion(Schedule.from_betas([0.1]), MeanType.START_X, "LEARNED", "RESCALED_KL")
    assert (d.mean_type, d.var_type, d.loss_type) == (
        MeanType.START_X,
        VarType.LEARNED,
        LossType.RESCALED_KL,
    )
    assert d.loss_type.is_vb() and not LossType.RESCALED_MSE.is_vb()


def test_an_empty_batch_is_an_empty_result():
    d = process()
    x, t = torch.zeros(0, 3, 4, 4), torch.zeros(0, dtype=torch.int64)
    assert d.p_mean_variance(torch.zeros(0, 6, 4, 4), x, t).mean.shape == x.shape


X = torch.zeros(SHAPE)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: d.q_sample(X, STEPS, X[:, :1]), r"noise.shape=\(5, 1, 4, 7\): .*\(5, 3, 4, 7\)"),
        (lambda d: d.q_sample(X, STEPS[:2], X), r"t='torch.int64 \(2,\)': int64 \[N\], here \(5,\)"),
        (lambda d: d.q_sample(X, STEPS.float(), X), "t='torch.float32"),
        (lambda d: d.q_sample(X, STEPS + 1, X), "t=20: steps from 0 to 19"),
        (lambda d: d.q_sample(X, STEPS - 1, X), "t=-1: steps from 0 to 19"),
        (lambda d: d.model_t(torch.tensor(3)), "t="),
        (lambda d: d.model_t(torch.tensor([20])), "t=20"),
        (lambda d: d.q_posterior(X, X[:1], STEPS), "x_t.shape"),
        (
            lambda d: d.p_mean_variance(X, X, STEPS),
            r"model_output.shape=\(5, 3, 4, 7\): \(5, 6, 4, 7\), with LEARNED_RANGE",
        ),
        (lambda d: d.p_mean_variance(X.repeat(1, 2, 1, 1), X, STEPS, True, torch.sum), "denoised_fn"),
        (lambda d: d.predict_eps_from_xstart(X, STEPS, X[:1]), "x_start.shape"),
        (lambda d: d.predict_xstart_from_eps(X, STEPS, X[:1]), "eps.shape"),
        (lambda d: d.predict_xstart_from_xprev(X, STEPS, X[:1]), "x_prev.shape"),
        (lambda d: GaussianDiffusion(d.schedule, "EPS"), "mean_type='EPS': nearest: EPSILON"),
        (lambda d: GaussianDiffusion(d.schedule, var_type="FIXED"), "var_type='FIXED': nearest: FIXED_"),
        (lambda d: GaussianDiffusion(d.schedule, loss_type=3), "loss_type=3: one of: MSE"),
    ],
)
def test_a_bad_argument_is_named_with_what_is_allowed(call, message):
    with pytest.raises(InvalidArgument, match=message):
        call(process())


def test_a_bad_gradient_is_named():
    d = process(var="FIXED_LARGE")
    p = d.p_mean_variance(X, X, STEPS)
    for call in (lambda: d.condition_mean(p, X[:1]), lambda: d.condition_score(p, X[:1], X, STEPS)):
        with pytest.raises(InvalidArgument, match="gradient.shape"):
            call()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_does_not_wait_for_the_device():
    d = process()
    output, x_t, v = (image.cuda() for image in images(3, torch.float32))
    output, t = torch.cat([output, v], dim=1), STEPS.cuda()
    expected = process().p_mean_variance(output.cpu(), x_t.cpu(), STEPS)
    d.p_mean_variance(output, x_t, d.model_t(t) * 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        p = d.p_mean_variance(output, x_t, t)
        d.condition_score(p, x_t, x_t, t)
        d.model_t(t)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(p.mean.cpu(), expected.mean)
