"""Tests of the posterior sampling example: it restores images, and a seed always gives the same image."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from admfast.engine.precision import FP32
from admfast.files.images import read_image
from admfast.ops.update import Stream, as_seeds, normal
from admfast.sampling.load import load
from admfast.verify.budget import default_budget
from tests.parity.golden import NETWORK_SAMPLES_LIMIT, compare

PATH = Path(__file__).resolve().parents[2] / "examples" / "dps.py"
STEPS = 20


@pytest.fixture(scope="module")
def dps():
    spec = importlib.util.spec_from_file_location("dps", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pipe(default_precision):
    return load("digits32", device="cpu")


def test_what_is_sampled_agrees_with_what_was_measured(dps, pipe):
    clean = pipe.sample([3, 8], [103, 108], steps=20, output="float")
    mask = torch.ones(1, 1, 32, 32)
    mask[..., 10:22, 10:22] = 0

    def residual(step_size: float) -> torch.Tensor:
        x = dps.dps_sample(pipe, lambda x: mask * x, mask * clean, [5, 6], [3, 8], STEPS, step_size)
        assert x.shape == clean.shape and not x.requires_grad
        return (mask * (x - clean)).flatten(1).norm(dim=1)

    guided, free = residual(1.0), residual(0.0)
    assert (guided < 0.4 * free).all()
    assert all(p.grad is None for p in pipe.net.parameters())


def by_a_loop(pipe, measure, y, seeds, classes, steps: int, step_size: float) -> torch.Tensor:
    """Run algorithm 1 of the paper as a plain loop over `predict`."""
    process, keys = pipe.process(str(steps)), as_seeds(seeds)
    x = normal(keys, y.shape[1:], 0, Stream.X_T)
    for row, i in enumerate(reversed(range(process.num_timesteps))):
        t, x_t = torch.full((len(keys),), i), x.detach().requires_grad_(True)
        x0 = pipe.predict(x_t, float(process.schedule.timestep_map[i]), classes).x0
        (gradient,) = torch.autograd.grad((y - measure(x0)).flatten(1).norm(dim=1).sum(), x_t)
        with torch.no_grad():
            posterior = process.q_posterior(x0.clamp(-1, 1), x_t, t)
            z = normal(keys, y.shape[1:], row, Stream.STEPS)
            x = posterior.mean + posterior.variance.sqrt() * z - step_size * gradient
    return x


@pytest.mark.parametrize("step_size", [0.0, 0.7])
def test_the_guide_is_the_paper_s_loop(dps, step_size):
    pipe, y = load("digits32", device="cpu", precision="fp32"), torch.zeros(2, 1, 32, 32)
    given = (torch.tanh, y, [5, 6], [3, 8], STEPS, step_size)
    wanted = by_a_loop(pipe, *given)
    # The formulas are the same but add their terms in another order, so the limit of trajectories applies.
    compare(dps.dps_sample(pipe, *given), wanted, NETWORK_SAMPLES_LIMIT, "x")


def test_an_image_is_its_seed_s(dps, pipe):
    y = torch.zeros(2, 1, 32, 32)
    both = dps.dps_sample(pipe, torch.tanh, y, [5, 6], [3, 8], 4)
    alone = dps.dps_sample(pipe, torch.tanh, y[:1], [6], [8], 4)
    assert (both[0] - both[1]).abs().max() > 0.1
    if pipe.policy is FP32:
        compare(both[1:], alone, NETWORK_SAMPLES_LIMIT, "x")
    assert (both[1:] - alone).norm() <= default_budget(pipe.policy).step * alone.norm()


def test_measurements_stay_with_their_images_in_any_batch(dps, monkeypatch):
    pipe = load("digits32", device="cpu", precision="fp32")
    y = torch.stack([torch.full((1, 32, 32), value) for value in (-0.9, 0.9)])
    given = (torch.tanh, y, [5, 6], [3, 8], STEPS)
    whole = dps.dps_sample(pipe, *given)
    monkeypatch.setattr("admfast.sampling.plan.default_batch_size", lambda *_: 1)
    compare(dps.dps_sample(pipe, *given), whole, NETWORK_SAMPLES_LIMIT, "x")


def test_the_script_draws_its_picture(dps, tmp_path, monkeypatch, capsys):
    out = tmp_path / "restored.png"
    monkeypatch.setattr("sys.argv", ["dps.py", "--out", str(out), "--steps", "2"])
    monkeypatch.setattr(dps.admfast, "load", lambda name: load(name, device="cpu"))
    dps.main()
    assert str(out) in capsys.readouterr().out and read_image(out).ndim == 3
