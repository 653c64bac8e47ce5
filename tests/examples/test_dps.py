"""The example of posterior sampling: it restores, and each image is its seed's."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from admfast.engine.precision import FP32
from admfast.engine.verify import budget_of
from admfast.files.images import read_image
from admfast.systems import load

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


def test_an_image_is_its_seed_s(dps, pipe):
    y = torch.zeros(2, 1, 32, 32)
    both = dps.dps_sample(pipe, torch.tanh, y, [5, 6], [3, 8], 4)
    alone = dps.dps_sample(pipe, torch.tanh, y[:1], [6], [8], 4)
    assert (both[0] - both[1]).abs().max() > 0.1
    if pipe.policy is FP32:
        assert (both[1:] - alone).abs().max() < 1e-4
    assert (both[1:] - alone).norm() <= budget_of(pipe.policy).step * alone.norm()


def test_the_script_draws_its_picture(dps, tmp_path, monkeypatch, capsys):
    out = tmp_path / "restored.png"
    monkeypatch.setattr("sys.argv", ["dps.py", "--out", str(out), "--steps", "2"])
    monkeypatch.setattr(dps.admfast, "load", lambda name: load(name, device="cpu"))
    dps.main()
    assert str(out) in capsys.readouterr().out and read_image(out).ndim == 3
