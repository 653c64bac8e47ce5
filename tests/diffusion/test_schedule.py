"""Tests of schedules against their definitions in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from admfast.diffusion import NOISE_SCHEDULES, Schedule, beta_schedule, make_schedule
from admfast.errors import InvalidArgument


def test_linear_betas():
    betas = beta_schedule("linear", 250)
    assert betas.dtype == np.float64 and betas.shape == (250,)
    assert betas[0] == pytest.approx(4e-4, rel=1e-15) and betas[-1] == pytest.approx(8e-2, rel=1e-15)
    assert np.ptp(np.diff(betas)) < 1e-15


def test_cosine_betas_give_the_cosine_alpha_bar():
    steps = 400
    u = np.arange(steps + 1) / steps
    bar = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    ours = np.cumprod(1 - beta_schedule("cosine", steps))
    assert np.allclose(ours[:-1], bar[1:-1] / bar[0], rtol=1e-10, atol=0)
    assert beta_schedule("cosine", steps)[-1] == 0.999


@pytest.mark.parametrize("name", NOISE_SCHEDULES)
@pytest.mark.parametrize("respacing", ["", "250", "ddim37", None])
def test_arrays_are_what_they_are_called(name, respacing):
    s = make_schedule(name, 1000, respacing)
    bar, prev = s.alphas_cumprod, s.alphas_cumprod_prev
    assert np.allclose(bar, np.exp(np.cumsum(np.log1p(-s.betas))), rtol=1e-12, atol=0)
    assert prev[0] == 1 and np.array_equal(prev[1:], bar[:-1])
    assert s.alphas_cumprod_next[-1] == 0 and np.array_equal(s.alphas_cumprod_next[:-1], bar[1:])
    assert np.allclose(s.sqrt_alphas_cumprod**2 + s.sqrt_one_minus_alphas_cumprod**2, 1, rtol=1e-15)
    assert np.allclose(s.sqrt_recip_alphas_cumprod**2 - s.sqrt_recipm1_alphas_cumprod**2, 1, rtol=1e-7)
    assert np.allclose(np.exp(s.log_one_minus_alphas_cumprod), 1 - bar, rtol=1e-14)
    # Bayes: the precisions of q(x_t | x_{t-1}) and q(x_{t-1} | x_0) add up.
    alpha = 1 - s.betas[1:]
    precision = alpha / s.betas[1:] + 1 / (1 - prev[1:])
    assert np.allclose(s.posterior_variance[1:], 1 / precision, rtol=1e-9)
    assert np.allclose(s.posterior_mean_coef1[1:], np.sqrt(prev[1:]) / (1 - prev[1:]) / precision, rtol=1e-9)
    assert np.allclose(s.posterior_mean_coef2[1:], np.sqrt(alpha) / s.betas[1:] / precision, rtol=1e-9)
    assert s.posterior_variance[0] == 0
    assert s.posterior_log_variance_clipped[0] == np.log(s.posterior_variance[1])
    assert np.array_equal(s.posterior_log_variance_clipped[1:], np.log(s.posterior_variance[1:]))


def test_respacing_recomputes_betas_even_when_all_are_kept():
    base, kept = make_schedule(respacing=None), make_schedule(respacing="")
    assert np.array_equal(base.betas, beta_schedule("linear", 1000))
    assert not np.array_equal(kept.betas, base.betas)
    assert np.allclose(kept.betas, base.betas, rtol=1e-10)
    assert np.array_equal(kept.timestep_map, base.timestep_map)


@given(data=st.data(), name=st.sampled_from(NOISE_SCHEDULES))
@settings(max_examples=50, deadline=None)
def test_respacing_keeps_alpha_bar(data, name):
    base = make_schedule(name, 120, None)
    first = sorted(data.draw(st.lists(st.integers(0, 119), min_size=1, unique=True)))
    second = sorted(data.draw(st.lists(st.integers(0, len(first) - 1), min_size=1, unique=True)))
    once = base.respaced(first)
    twice = once.respaced(second)
    direct = base.respaced([first[i] for i in second])
    assert np.allclose(once.alphas_cumprod, base.alphas_cumprod[first], rtol=1e-11)
    assert np.allclose(twice.alphas_cumprod, direct.alphas_cumprod, rtol=1e-11)
    assert np.array_equal(twice.timestep_map, direct.timestep_map)
    assert twice.original_steps == 120
    assert np.isfinite(twice.posterior_log_variance_clipped).all()


def test_the_timestep_that_the_network_sees():
    mapped = make_schedule("linear", 1000, "ddim25")
    assert mapped.model_t(3) == 120 and isinstance(mapped.model_t(3), int)
    assert mapped.model_t(0.5) == 20.0 and mapped.model_timesteps.dtype == np.int64
    scaled = make_schedule("cosine", 400, "4,3,3", rescale_timesteps=True)
    assert scaled.model_timesteps.dtype == np.float32
    assert [scaled.model_t(i) for i in (0, 1, 9)] == [0.0, 110.0, 997.5]
    assert scaled.model_t(0.5) == 55.0
    base = make_schedule("cosine", 12, None, rescale_timesteps=True)
    assert base.model_t(5) == np.float32(5) * np.float32(1000 / 12)
    for index in (-1, 25, 24.5, float("nan")):
        with pytest.raises(InvalidArgument, match="index=.*from 0 to 24"):
            mapped.model_t(index)


@pytest.mark.parametrize("name", NOISE_SCHEDULES)
def test_log_snr(name):
    s = make_schedule(name, 1000, None)
    index = np.concatenate([np.arange(1000), np.linspace(0, 999, 777)])
    values = s.log_snr(index)
    assert np.allclose(values[:1000], np.log(s.alphas_cumprod / (1 - s.alphas_cumprod)), rtol=1e-12)
    middle = s.log_snr([10.25])
    assert middle == pytest.approx(0.75 * s.log_snr(10) + 0.25 * s.log_snr(11), rel=1e-14)
    with pytest.raises(InvalidArgument, match="index="):
        s.log_snr(1000)


def test_one_step_is_a_schedule():
    """The published code fails here because it reads the second posterior variance."""
    s = make_schedule("linear", 1000, "ddim1")
    assert s.num_timesteps == 1 and s.timestep_map.tolist() == [0]
    assert s.posterior_log_variance_clipped[0] == np.log(s.betas[0])


def test_a_last_beta_of_one_is_allowed_without_warning():
    with np.errstate(all="raise"):
        s = make_schedule("linear", 20, None)
    assert s.alphas_cumprod[-1] == 0 and s.sqrt_recip_alphas_cumprod[-1] == np.inf


def test_arrays_are_float64_and_read_only():
    s = Schedule.from_betas([0.1, 0.2])
    assert s.betas.dtype == np.float64 and s.timestep_map.dtype == np.int64
    for name, value in vars(s).items():
        if isinstance(value, np.ndarray):
            assert not value.flags.writeable, name
    with pytest.raises(AttributeError):
        s.betas = np.array([0.1])  # type: ignore[misc]


def test_the_given_array_stays_writeable_and_unshared():
    betas = np.array([0.1, 0.2])
    s = Schedule.from_betas(betas)
    betas[0] = 0.9
    assert s.betas[0] == 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: beta_schedule("linaer", 100), "noise_schedule='linaer': nearest: linear"),
        (lambda: beta_schedule("quadratic", 100), "noise_schedule='quadratic': one of: linear, cosine"),
        (lambda: beta_schedule("linear", 19), "steps=19: a linear schedule takes at least 20"),
        (lambda: beta_schedule("cosine", 0), "steps=0: a whole number"),
        (lambda: beta_schedule("cosine", 10.0), "steps=10.0: a whole number"),
        (lambda: make_schedule(respacing="0"), "respacing='0': at least one step"),
        (lambda: make_schedule(respacing="dim25"), "nearest: ddim25"),
        (lambda: Schedule.from_betas([]), "betas="),
        (lambda: Schedule.from_betas([[0.1]]), "betas="),
        (lambda: Schedule.from_betas([0.1, 0.0]), r"betas\[1\]=0.0: greater than 0, at most 1"),
        (lambda: Schedule.from_betas([1.1]), r"betas\[0\]=1.1"),
        (lambda: Schedule.from_betas([float("nan")]), r"betas\[0\]=nan"),
        (lambda: Schedule.from_betas([0.1, 0.2], timestep_map=[0]), "timestep_map="),
        (lambda: Schedule.from_betas([0.1, 0.2], timestep_map=[0.0, float("nan")]), "timestep_map="),
        (lambda: Schedule.from_betas([0.1, 0.2], timestep_map=[1, 0]), r"timestep_map=\[1, 0\]: rising"),
        (lambda: Schedule.from_betas([0.1, 0.2], timestep_map=[0, 2]), "timestep_map="),
        (lambda: Schedule.from_betas([0.1, 0.2], original_steps=1), "original_steps=1"),
        (lambda: Schedule.from_betas([0.1, 0.2]).respaced([]), "steps="),
        (lambda: Schedule.from_betas([0.1, 0.2]).respaced([0, 2]), r"steps=\[0, 2\]: rising, from 0 to 1"),
        (lambda: Schedule.from_betas([0.1, 0.2]).respaced([1, 0]), "rising"),
    ],
)
def test_a_bad_argument_is_named_with_what_is_allowed(call, message):
    with pytest.raises(InvalidArgument, match=message):
        call()
