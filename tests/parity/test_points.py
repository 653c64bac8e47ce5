"""Tests that single calls of the process equal the published ones."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from admfast.diffusion import (
    DiffusionConfig,
    approx_standard_normal_cdf,
    discretized_gaussian_log_likelihood,
    normal_kl,
    prior_bpd,
    vb_terms_bpd,
)
from tests.parity.analytic import analytic_model, build_diffusion, guidance
from tests.parity.golden import POINT_LIMIT, cases, compare, load_json, load_tensors

INPUTS = ("x_start", "noise", "t", "y", "x_t")
EPS = torch.finfo(torch.float32).eps


def _cancelling(case: dict, golden: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the sizes of terms that cancel, by output: processors round each term differently, by an eps.

    prior_bpd is -1 - log(variance) + variance in bits, which is 4e-7 at the last step. x_0 from eps is
    x_t / sqrt(alpha_bar) minus a term of about the same size.
    """
    largest = float(build_diffusion(case["diffusion"]).schedule.sqrt_recip_alphas_cumprod.max())
    x_0 = largest * float(golden["x_t"].abs().max())
    return {"prior_bpd": 1 / math.log(2.0), "p_clip_pred_xstart": x_0, "p_noclip_pred_xstart": x_0}


def _calls(case: dict, golden: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return our value of every array of a points file, by name."""
    diffusion = build_diffusion(case["diffusion"])
    model = analytic_model(diffusion)
    x_start, noise, t, y, x_t = (golden.get(name) for name in INPUTS)
    q = diffusion.q_mean_variance(x_start, t)
    noised = diffusion.q_sample(x_start, t, noise)
    posterior = diffusion.q_posterior(x_start, x_t, t)
    gradient = guidance(x_t, diffusion.model_t(t), y, case["cond_scale"])
    output = model(x_t, diffusion.model_t(t), y)
    output_at_noised = model(noised, diffusion.model_t(t), y)
    ours = {
        "q_mean": q.mean,
        "q_variance": q.variance,
        "q_log_variance": q.log_variance,
        "q_sample": noised,
        "q_posterior_mean": posterior.mean,
        "q_posterior_variance": posterior.variance,
        "q_posterior_log_variance": posterior.log_variance,
        "predict_xstart_from_eps": diffusion.predict_xstart_from_eps(x_t, t, noise),
        "predict_eps_from_xstart": diffusion.predict_eps_from_xstart(x_t, t, x_start),
        "predict_xstart_from_xprev": diffusion.predict_xstart_from_xprev(x_t, t, noise),
        "prior_bpd": prior_bpd(diffusion, x_start),
    }
    for word, clip in (("clip", True), ("noclip", False)):
        p = diffusion.p_mean_variance(output, x_t, t, clip_denoised=clip)
        guided = diffusion.condition_score(p, gradient, x_t, t)
        vb = vb_terms_bpd(diffusion, output_at_noised, x_start, noised, t, clip_denoised=clip)
        ours |= {
            f"p_{word}_mean": p.mean,
            f"p_{word}_variance": p.variance,
            f"p_{word}_log_variance": p.log_variance,
            f"p_{word}_pred_xstart": p.pred_xstart,
            f"condition_mean_{word}": diffusion.condition_mean(p, gradient),
            f"condition_score_{word}_mean": guided.mean,
            f"condition_score_{word}_pred_xstart": guided.pred_xstart,
            f"vb_{word}_output": vb.output,
        }
    return ours


@pytest.mark.parametrize("path", cases("sampling", "points"))
def test_point(path: Path):
    golden, case = load_tensors(path), load_json(path)
    ours = _calls(case, golden)
    terms = _cancelling(case, golden)
    assert set(ours) == set(golden) - set(INPUTS)
    for name, value in ours.items():
        scale = float(golden[name].abs().max()) or 1.0
        compare(value, golden[name], POINT_LIMIT + EPS * terms.get(name, 0.0) / scale, name)


@pytest.mark.parametrize("path", cases("sampling", "points", pattern="likelihood_functions.npz"))
def test_likelihood_functions(path: Path):
    g = load_tensors(path)
    compare(normal_kl(g["mean1"], g["logvar1"], g["mean2"], g["logvar2"]), g["normal_kl"], POINT_LIMIT, "kl")
    standard = normal_kl(g["mean1"], g["logvar1"], 0.0, 0.0)
    compare(standard, g["normal_kl_standard"], POINT_LIMIT, "kl to N(0, 1)")
    compare(approx_standard_normal_cdf(g["cdf_x"]), g["cdf"], POINT_LIMIT, "cdf")
    log_likelihood = discretized_gaussian_log_likelihood(g["x"], means=g["means"], log_scales=g["log_scales"])
    compare(log_likelihood, g["discretized_log_likelihood"], POINT_LIMIT, "log likelihood")


def _flags(case: dict) -> dict | None:
    """Return the published command line flags of a case, or None if flags can't express it."""
    return case.get("cli_flags") or case.get("cli_flags_of_create_gaussian_diffusion")


def _cases_with_flags() -> list:
    found = cases("sampling", pattern="*/*.json")
    return [case for case in found if case.values[0] is None or _flags(load_json(case.values[0]))]


@pytest.mark.parametrize("path", _cases_with_flags())
def test_flags_give_the_process(path: Path):
    case = load_json(path)
    flags = _flags(case)
    built, stated = DiffusionConfig.from_flags(**flags).build(), build_diffusion(case["diffusion"])
    assert (built.mean_type, built.var_type) == (stated.mean_type, stated.var_type)
    assert built.loss_type == stated.loss_type
    assert built.schedule.betas.tolist() == stated.schedule.betas.tolist()
    assert built.schedule.model_timesteps.tolist() == stated.schedule.model_timesteps.tolist()
