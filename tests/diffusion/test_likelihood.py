"""Tests of divergence, discretized likelihood and variational bound against closed forms in float64."""

from __future__ import annotations

import math

import pytest
import torch

from admfast.diffusion import (
    GaussianDiffusion,
    approx_standard_normal_cdf,
    bits_per_dimension,
    discretized_gaussian_log_likelihood,
    make_schedule,
    mean_flat,
    normal_kl,
    prior_bpd,
    vb_terms_bpd,
)
from admfast.errors import InvalidArgument

LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1
SHAPE = (4, 3, 4, 5)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def picture() -> torch.Tensor:
    index = torch.randint(0, 256, SHAPE, generator=torch.Generator().manual_seed(5))
    return LEVELS[index]


def process(var: str = "FIXED_SMALL", steps: str = "8") -> GaussianDiffusion:
    return GaussianDiffusion(make_schedule("linear", 1000, steps), "EPSILON", var)


def test_kl_is_the_one_of_torch():
    mean1, log_var1, mean2, log_var2 = random(4, 100)
    p = torch.distributions.Normal(mean1, (0.5 * log_var1).exp())
    q = torch.distributions.Normal(mean2, (0.5 * log_var2).exp())
    expected = torch.distributions.kl_divergence(p, q)
    torch.testing.assert_close(normal_kl(mean1, log_var1, mean2, log_var2), expected, rtol=1e-12, atol=1e-14)
    assert not normal_kl(mean1, log_var1, mean1, log_var1).any()


def test_kl_takes_numbers_for_the_second():
    mean, log_var = random(2, 50)
    zero = torch.zeros_like(mean)
    assert torch.equal(normal_kl(mean, log_var, 0.0, 0.0), normal_kl(mean, log_var, zero, zero))


def test_approximate_cdf_is_within_2e_4():
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    exact = torch.special.ndtr(x)
    error = (approx_standard_normal_cdf(x) - exact).abs().max()
    assert 1e-4 < float(error) < 2e-4


@pytest.mark.parametrize("log_scale", [-4.0, -2.0, 0.0, 2.0])
@pytest.mark.parametrize("mean", [-1.2, -0.3, 0.0, 0.999])
def test_the_256_levels_have_probability_one(mean, log_scale):
    log_p = discretized_gaussian_log_likelihood(
        LEVELS, means=torch.full_like(LEVELS, mean), log_scales=torch.full_like(LEVELS, log_scale)
    )
    assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-8)


def test_a_level_has_the_probability_of_its_bin():
    mean, scale = 0.1, 0.2
    x = LEVELS[1:-1]
    normal = torch.distributions.Normal(mean, scale)
    exact = normal.cdf(x + 1 / 255) - normal.cdf(x - 1 / 255)
    ours = discretized_gaussian_log_likelihood(
        x, means=torch.full_like(x, mean), log_scales=torch.full_like(x, math.log(scale))
    ).exp()
    assert float((ours - exact).abs().max()) < 2e-4 and float(exact.max()) > 0.01


def test_an_impossible_level_has_a_floor_and_no_gradient():
    mean = torch.full((1,), 0.9, requires_grad=True)
    x, log_scale = torch.full((1,), -0.5), torch.full((1,), -6.0)
    log_p = discretized_gaussian_log_likelihood(x, means=mean, log_scales=log_scale)
    log_p.sum().backward()
    assert float(log_p.detach()) == pytest.approx(math.log(1e-12)) and float(mean.grad) == 0


def test_likelihood_refuses_other_shapes():
    with pytest.raises(InvalidArgument, match=r"means.shape=\(1,\)"):
        discretized_gaussian_log_likelihood(LEVELS, means=LEVELS[:1], log_scales=LEVELS)


def test_mean_flat():
    x = random(*SHAPE)
    torch.testing.assert_close(mean_flat(x), torch.stack([image.mean() for image in x]))


def test_prior_is_the_closed_form():
    d, x = process(), picture()
    bar = d.schedule.alphas_cumprod[-1]
    kl = 0.5 * (bar * x**2 + (1 - bar) - 1 - math.log(1 - bar))
    expected = kl.flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(prior_bpd(d, x), expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("var", ["FIXED_SMALL", "FIXED_LARGE"])
def test_a_term_of_the_bound(var):
    """With the true noise the means agree, so only the variances contribute, and at t = 0 the decoder."""
    d, x, noise = process(var), picture(), random(*SHAPE)
    t = torch.tensor([0, 1, 5, 7])
    x_t = d.q_sample(x, t, noise)
    terms = vb_terms_bpd(d, noise, x, x_t, t)
    torch.testing.assert_close(terms.pred_xstart, x, rtol=0, atol=1e-10)
    schedule = d.schedule
    for row, step in enumerate(t.tolist()):
        if step == 0:
            scale = 0.5 * math.log(schedule.posterior_variance[1])
            log_p = discretized_gaussian_log_likelihood(x, means=x, log_scales=torch.full_like(x, scale))
            expected = -float(log_p[row].mean()) / math.log(2)
        else:
            small = schedule.posterior_variance[step]
            large = schedule.betas[step] if var == "FIXED_LARGE" else small
            expected = 0.5 * (small / large - 1 - math.log(small / large)) / math.log(2)
        assert float(terms.output[row]) == pytest.approx(expected, rel=1e-8, abs=1e-10)


def test_bits_per_dimension_of_a_network_that_knows_the_noise():
    d, x = process(), picture()
    noises = random(8, *SHAPE, seed=1)
    seen = []

    def model(x_t, t, answer):
        seen.append(t)
        return answer[8 - len(seen)]

    answer = noises.flip(0)  # answer[i] is the noise at t = i
    steps = []
    result = bits_per_dimension(
        d,
        model,
        x,
        model_kwargs={"answer": answer},
        noises=noises,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert [int(t[0]) for t in seen] == d.schedule.timestep_map[::-1].tolist()
    assert steps == [(i, 8) for i in range(1, 9)]
    assert result.vb.shape == result.mse.shape == result.xstart_mse.shape == (4, 8)
    assert float(result.vb[:, :-1].abs().max()) < 1e-10  # the last column is t = 0, the decoder
    assert float(result.vb[:, -1].min()) > 0
    assert float(result.mse.max()) < 1e-15 and float(result.xstart_mse.max()) < 1e-15
    torch.testing.assert_close(result.total_bpd, result.prior_bpd + result.vb.sum(1))


def test_bits_per_dimension_draws_from_its_generator():
    d, x = process(), picture()

    def run(**kwargs):
        return bits_per_dimension(d, lambda x_t, t: 0.9 * x_t, x, **kwargs).mse

    first = run(generator=torch.Generator().manual_seed(1))
    assert torch.equal(first, run(generator=torch.Generator().manual_seed(1)))
    assert not torch.equal(first, run(generator=torch.Generator().manual_seed(2)))
    torch.manual_seed(4)
    drawn = run()
    torch.manual_seed(4)
    assert torch.equal(drawn, run(noises=(torch.randn_like(x) for _ in range(8))))


def test_bits_per_dimension_keeps_no_graph():
    d, x = process(), picture()
    weight = torch.ones((), requires_grad=True)
    result = bits_per_dimension(d, lambda x_t, t: weight * x_t, x)
    assert not result.total_bpd.requires_grad


@pytest.mark.parametrize("count", [7, 9])
def test_a_wrong_number_of_noises_is_named(count):
    d, x = process(), picture()
    with pytest.raises(InvalidArgument, match=f"noises='{count} tensors': 8, one per step"):
        bits_per_dimension(d, lambda x_t, t: x_t, x, noises=random(count, *SHAPE))


def test_too_few_noises_of_an_iterator_are_named():
    d, x = process(), picture()
    with pytest.raises(InvalidArgument, match="noises='2 tensors': 8, one per step"):
        bits_per_dimension(d, lambda x_t, t: x_t, x, noises=iter(random(2, *SHAPE)))
